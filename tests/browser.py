"""Pages as a real browser without a network shows them."""

import subprocess
from pathlib import Path

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--window-size=1400,900",
    "--virtual-time-budget=300000",  # milliseconds in which nothing is waited for; a tenth is too few for the charts
    "--dump-dom",
]


def opened(chromium: str, address: str, profile: Path) -> str:
    """Return the page's HTML after its scripts have run. profile: an empty folder, for a person who was never there."""
    words = [chromium, *FLAGS, f"--user-data-dir={profile}", address]
    return subprocess.run(words, capture_output=True, text=True, timeout=200, check=True).stdout

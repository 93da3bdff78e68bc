"""What a training wrote about itself while it ran: history.jsonl, a line every few steps."""

import json
from pathlib import Path
from typing import Any

from consistency.errors import UserError


def read_history(path: Path, made_by: str) -> list[dict[str, Any]]:
    """The lines of a history, none for a teacher that was not trained here.

    made_by names the verb that writes it. Raises UserError when the file is missing or damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): run `python -m consistency {made_by}` first") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run `{made_by}` again") from None

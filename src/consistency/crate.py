"""The RO-Crate metadata of an archive: what its files are, who and what made them, from what, on which terms."""

import json
import mimetypes
import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consistency.cards import Card
from consistency.study import Study, parse_yaml

if TYPE_CHECKING:
    from rocrate.rocrate import ROCrate

    from consistency.archive import Member

#: the version whose profile for workflows is settled (Workflow RO-Crate 1.0)
VERSION = "1.1"
CITATION, WORKFLOW = Path("CITATION.cff"), "Snakefile"


def crate_metadata(study: Study, cards: list[Card], members: "list[Member]", terms: tuple[str, str] | None) -> bytes:
    """The text of ro-crate-metadata.json, the same for the same results. terms: an official checkpoint and its licence.

    Raises UserError when CITATION.cff cannot be read.
    """
    from rocrate.rocrate import ROCrate

    citation = parse_yaml(CITATION.read_text(), CITATION)
    crate = ROCrate(version=VERSION)
    crate.name = study.title or study.name
    crate.description = (
        f"Study {study.name} (settings {study.key('report')}) of {citation['title']}: report, scores, coefficients, "
        "networks and a card of each, with the workflow and the locked environment that made them."
    )
    crate.datePublished = max(card.created for card in cards)
    licences = [_licence(crate, citation["license"]), *_further_licence(crate, terms)]
    crate.license = licences if terms else licences[0]
    crate.root_dataset["author"] = _authors(crate, citation["authors"])
    crate.root_dataset["identifier"] = f"{study.name}-{study.key('report')}"
    files = _add_files(crate, members)
    if terms:
        for name in (name for name in files if name.endswith(".safetensors")):
            files[name]["license"] = licences[1]
    versions = sorted({package for card in cards for package in card.versions.items()})
    files[WORKFLOW]["softwareRequirements"] = [_package(crate, *package) for package in versions]
    for card in cards:
        _add_action(crate, card, files, f"results/{study.name}/")
    return (json.dumps(crate.metadata.generate(), indent=2, sort_keys=True) + "\n").encode()


def _context(crate: "ROCrate", identifier: str, properties: dict[str, Any]) -> Any:
    """An entity that is no file of the archive, added once."""
    from rocrate.model.contextentity import ContextEntity

    return crate.get(identifier) or crate.add(ContextEntity(crate, identifier, properties))


def _licence(crate: "ROCrate", name: str) -> Any:
    return _context(crate, f"https://spdx.org/licenses/{name}", {"@type": "CreativeWork", "name": name})


def _further_licence(crate: "ROCrate", terms: tuple[str, str] | None) -> list[Any]:
    """That of the networks, where they come from an official checkpoint."""
    if terms is None:
        return []
    properties = {"@type": "CreativeWork", "name": terms[1], "description": f"the terms of {terms[0]}: see NOTICE"}
    return [_context(crate, "#terms-of-the-teacher", properties)]


def _authors(crate: "ROCrate", authors: Iterable[dict[str, str]]) -> list[Any]:
    found = []
    for author in authors:
        name = author.get("name") or f"{author.get('given-names', '')} {author.get('family-names', '')}".strip()
        kind = "Organization" if "name" in author else "Person"
        identifier = author.get("orcid") or f"#{_slug(name)}"
        found.append(_context(crate, identifier, {"@type": kind, "name": name}))
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _add_files(crate: "ROCrate", members: "list[Member]") -> dict[str, Any]:
    """Every file of the archive, with its digest; the Snakefile as the workflow."""
    files = {}
    for member in sorted(members, key=lambda member: member.name):
        kind = mimetypes.guess_type(member.name)[0] or "application/octet-stream"
        described = {"contentSize": str(member.size), "encodingFormat": kind, "sha256": member.sha256}
        if member.name == WORKFLOW:
            files[member.name] = crate.add_workflow(
                dest_path=member.name, main=True, lang="snakemake", properties=described | {"name": "the workflow"}
            )
        else:
            files[member.name] = crate.add_file(dest_path=member.name, properties=described)
    return files


def _package(crate: "ROCrate", name: str, version: str) -> Any:
    properties = {"@type": "SoftwareApplication", "name": name, "softwareVersion": version}
    return _context(crate, f"#{_slug(f'{name} {version}')}", properties)


def _add_action(crate: "ROCrate", card: Card, files: dict[str, Any], prefix: str) -> None:
    """What one stage did: when, with which code, from what to what."""
    ended = datetime.fromisoformat(card.created)
    dirty = " with changes" if card.git.get("dirty") else ""
    code = _package(crate, "consistency-distillation", f"{card.git.get('commit') or 'unknown'}{dirty}")
    properties = {
        "@type": "CreateAction",
        "name": card.label,
        "description": card.command,
        "startTime": (ended - timedelta(seconds=card.seconds)).isoformat(timespec="seconds"),
        "endTime": card.created,
        "instrument": [files[WORKFLOW], code],
        "object": [_file(crate, name, card.inputs[name], files, prefix) for name in card.inputs],
        "result": [_file(crate, name, card.outputs[name], files, prefix) for name in card.outputs],
    }
    crate.root_dataset.append_to("mentions", _context(crate, f"#{_slug(card.label)}", properties))


def _file(crate: "ROCrate", name: str, digest: str, files: dict[str, Any], prefix: str) -> Any:
    """A file by its path from the study's folder on, or what stands for one that the archive has not."""
    packed = files.get(prefix + name)
    if packed is not None:
        return packed
    properties = {"@type": "CreativeWork", "name": name, "sha256": digest, "description": "not in this archive"}
    return _context(crate, f"#{name}", properties)

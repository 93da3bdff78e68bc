"""The reference of the configuration, whose tables are generated from the classes of study.py."""

import json
from pathlib import Path
from typing import Any

from consistency.base.files import write_bytes
from consistency.config.networks import NETWORKS, Network
from consistency.config.objectives import OBJECTIVES
from consistency.config.student import Student
from consistency.config.study import Study

# The Snakemake workflow catalog shows this page as the instructions of the workflow.
REFERENCE = Path("config/README.md")

_HEAD = """# Configuration

These files say what a run makes, and where it runs. Used as a module (`docs/module.md`), the workflow reads those in
your folder.

- `config/config.yaml` has the key `studies`: the name of a study, or a list of names. The command line replaces it:
  `--config studies=tiny`, `--config 'studies=[digits,tiny]'`.
- `config/studies/NAME.yaml` is a study: one dataset, one teacher, and the students distilled from it. The tables below
  have its keys.
- `config/resources.yaml` lists the downloads by file name, with address, licence and digest (`docs/data.md`).
  `config/resources.lock` records digests that nobody publishes.
- `profiles/default/config.yaml` has the options of every run; Snakemake takes it by itself.
- `profiles/slurm/config.yaml` describes the site: partitions, GPUs, memory and minutes of each rule
  (`docs/cluster.md`). `--profile profiles/slurm` selects it.

To make a study of your own, copy one, set `name` to the new file's name, change what you like, and check it:

    cp config/studies/digits.yaml config/studies/NAME.yaml
    python -m consistency check --study config/studies/NAME.yaml
    snakemake --cores all --config studies=NAME

Unknown keys, wrong types and impossible combinations are errors before any work begins. Students take the values of
`student`. Each entry of `students` may replace only the keys named in `varies`, so that two compared students differ in
nothing else. Each kind of section has a table below. `python -m consistency reference` generates this page.
"""


def write_reference() -> None:
    """Write the reference, relative to the project's root: one table for the study and one per section."""
    schema = Study.model_json_schema()
    sections = schema["$defs"]
    for base, registry in ((Network, NETWORKS), (Student, OBJECTIVES)):
        for member in registry.values():
            own = member.model_json_schema()
            own["properties"] = {
                key: own["properties"][key] for key in own["properties"] if key not in base.model_fields
            }
            sections |= own.pop("$defs", {}) | {member.__name__: own}
    tables = [_table(name, section) for name, section in sections.items()]
    write_bytes(REFERENCE, "\n".join([_HEAD, _table("Study", schema), *tables]).encode())


def _table(title: str, section: dict[str, Any]) -> str:
    lines = [f"## {title}", "", section.get("description", "").split("\n\n")[0].replace("\n", " "), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in section["properties"].items():
        default = f"`{json.dumps(field['default'])}`" if "default" in field else "see below"
        default = "**required**" if name in section.get("required", []) else default
        lines.append(f"| `{name}` | {_type(field)} | {default} | {field.get('description', '')} |")
    return "\n".join(lines) + "\n"


def _type(field: dict[str, Any]) -> str:
    """Describe a field's type and range in words."""
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    words = {"string": "text", "boolean": "true/false", "null": "none", "object": "keys and values"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]:g}" for name, sign in bounds.items() if name in field]
    return " ".join([words.get(field["type"], field["type"]), *limits])

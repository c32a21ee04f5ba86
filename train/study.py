"""`python -m train.study NAME`: the runs of train/studies/NAME.yaml, and a table of them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.__main__ import guarded
from train.config import Config, check_keys, make_config, named_yaml, parse_flags, read_yaml
from train.errors import ConfigError

STUDIES = Path(__file__).parent / "studies"

USAGE = """\
python -m train.study NAME [--KEY=VALUE ...]

NAME is a file of train/studies: `title` and `text` for the report, `common` for the keys of all
runs, `runs` for a list of runs with their own keys. Flags override all of them.
"""


def study_configs(
    study: dict[str, Any], name: str, flags: dict[str, str]
) -> tuple[Path, list[Config]]:
    """The study's folder and the configuration of each run, whose results go into folders there.

    Raises:
        ConfigError: a key or value is wrong.
    """
    check_keys(flags, "the command line")
    folder = Path(flags.pop("output_dir", f"runs/{name}"))
    runs, common = study.get("runs"), study.get("common", {})
    if not isinstance(runs, list) or not runs or not all(isinstance(r, dict) for r in runs):
        raise ConfigError(f"{name}.yaml must hold 'runs', a list of runs with 'key: value' lines")
    if not isinstance(common, dict):
        raise ConfigError(f"common of {name}.yaml must hold 'key: value' lines")
    for key in ("title", "text"):
        if not isinstance(study.get(key, ""), str):
            raise ConfigError(f"{key} of {name}.yaml must be text")
    configs = []
    for number, own in enumerate(runs, 1):
        layers = [
            (f"common of {name}.yaml", common),
            (f"run {number} of {name}.yaml", own),
            ("the command line", flags),
        ]
        run_name = make_config(*layers).run_name
        configs.append(make_config(*layers, ("", {"output_dir": str(folder / run_name)})))
    names = [config.run_name for config in configs]
    if len(set(names)) < len(names):
        raise ConfigError(f"{name}.yaml has two runs of the same name among {', '.join(names)}")
    return folder, configs


def main(arguments: Sequence[str]) -> int:
    """Run the study and print its table; the exit code of the process."""
    if not arguments or arguments[0].startswith("-"):
        known = ", ".join(sorted(path.stem for path in STUDIES.glob("*.yaml")))
        print(f"{USAGE}\nNAME is one of: {known}")
        return 0 if "--help" in arguments or "-h" in arguments else 2
    name = arguments[0]
    study = read_yaml(named_yaml(name, STUDIES, "study"))
    folder, configs = study_configs(study, name, parse_flags(arguments[1:]))
    # Here, so that a typing error is answered before torch is imported.
    from train import results
    from train.progress import make_console
    from train.run import run

    console = make_console()
    finished = []
    for number, config in enumerate(configs, 1):
        console.print(f"[{number}/{len(configs)}] {config.run_name}", markup=False)
        finished.append(run(config, console))
    title, text = study.get("title", name), study.get("text", "")
    results.write_all(folder, title, finished, text)
    results.write_json(folder / "result.json", {"study": name, "runs": finished})
    results.print_table(console, finished)
    console.print(f"written to {folder}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))

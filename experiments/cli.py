"""The console script: `specbench VERB [key=value ...]`.

A verb is a module of experiments/ with `run(cfg)`; its root config is in configs/. One run is composed and called here;
`-m` calls hydra.main, so that every sweeper and launcher of Hydra works. An error that a user can correct is printed as
one sentence on stderr, with exit code 2; SPECBENCH_DEBUG=1 also shows the traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import specbench  # noqa: F401 - refuses what is installed in versions that are not supported
except ImportError as error:
    print(f"specbench: {error}", file=sys.stderr)
    sys.exit(2)

from specbench.cli import completion
from specbench.cli.environment import check_environment, outlet
from specbench.cli.verbs import VERBS, Verb
from specbench.cli.withholding import screen, withhold
from specbench.runs.termination import sigterm_interrupts

if TYPE_CHECKING:
    from omegaconf import DictConfig

OPTIONS = ("-h", "--help", "-m", "--multirun", "--cfg")
MISTAKE = 2


def main(argv: Sequence[str] | None = None, verbs: Mapping[str, Verb] = VERBS, package: str = "configs") -> int:
    """Run one command line. Returns the exit code: 0; 2 for an error that the user can correct; 1 for a defect."""
    words = withhold(sys.argv[1:] if argv is None else argv)
    if argv is None:
        sys.argv[1:] = words  # what records keep of the command, and what the ranks of a training repeat
    with screen():
        return _guarded(words, verbs, package)


def _guarded(words: list[str], verbs: Mapping[str, Verb], package: str) -> int:
    """`_main`, with every error converted to its exit code."""
    try:
        with sigterm_interrupts(), outlet() as stdout:
            code = _main(words, verbs, package)
        # A reader that closes the pipe, for example `head`, is not an error.
        if stdout.fault is not None and not isinstance(stdout.fault, BrokenPipeError):
            print(
                f"specbench: stdout cannot be written ({stdout.fault.strerror}); the work itself is done",
                file=sys.stderr,
            )
            return MISTAKE
        return code
    except BaseException as error:
        return _fail(error)


def _main(words: list[str], verbs: Mapping[str, Verb], package: str) -> int:
    if not words:
        return _where_you_are()
    if words[0] in ("-h", "--help"):
        from specbench.cli.help import overview

        print(overview(verbs))
        return 0
    if words[0] == completion.ASK:
        print("\n".join(completion.answers(words[1:], verbs, package)))
        return 0
    name, *rest = words
    if name not in verbs:
        from specbench.cli.errors import nearest

        raise ValueError(f"there is no verb '{name}'{nearest(name, verbs)}; `specbench --help` lists them")
    options, overrides = _split(name, rest)
    check_environment()
    quiet()
    from specbench.cli import config_groups
    from specbench.cli import overrides as composing
    from specbench.cli import target_argument as targeting

    verb = verbs[name]
    if verb.takes:
        overrides = composing.named(overrides, verb.takes, verb.several)
    overrides = composing.readable(overrides, sweep="multirun" in options)
    with config_groups.configs(package):
        if "help" in options:
            from specbench.cli.help import page

            print(page(name, verb, overrides))
            return 0
        if verb.filters:
            overrides = composing.with_filters(verb.config, overrides)
        overrides = targeting.expand(overrides, config_groups.options("target"))
        composing.check(name, verb.config, overrides)
        cfg = composing.compose(verb.config, composing.first_job(overrides) if "multirun" in options else overrides)
        sweep = "multirun" in options or composing.is_sweep(name, cfg, overrides)
        if "cfg" in options:
            print(composing.as_yaml(cfg, options["cfg"]), end="")
            return 0
        if not sweep:
            composing.check_values(name, verb.config, cfg)
            Job(name, verb)(composing.without_hydra(cfg))
            return 0
        listed = [composing.compose(verb.config, job) for job in composing.jobs(cfg, overrides)]
        for job in listed:
            composing.check_values(name, verb.config, job)
        from specbench.cli import checks

        checks.sweep(name, [composing.without_hydra(job) for job in listed], verb.module)
        overrides = composing.texts(verb.config, overrides)
        sys.argv = [sys.argv[0], "--multirun", *overrides, *composing.sweep_defaults(name, cfg, overrides)]
    import hydra

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back to us instead of being printed there
    hydra.main(version_base="1.3", config_path=f"pkg://{package}", config_name=verb.config)(Job(name, verb))()
    return 0


def _where_you_are() -> int:
    """`specbench` alone: the first line of the help, and what exists below the root that verbs write to."""
    from experiments.status import show

    print("specbench: the laboratory for speculative-decoding draft models; `specbench --help` lists its verbs\n")
    show(Path("outputs"))
    return 0


class Job:
    """What a launcher runs: the verb with one configuration. It can be pickled and sent to a Slurm node."""

    def __init__(self, name: str, verb: Verb) -> None:
        self.name, self.verb = name, verb

    def __call__(self, cfg: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig

        from specbench import fast
        from specbench.cli.recording import learn_from

        quiet()
        learn_from(cfg)
        fast.enable(cfg.get("fast", True))
        if not str(HydraConfig.get().mode).endswith("MULTIRUN"):
            return load(self.verb).run(cfg)
        # The job as a command of its own: for its record, and for ranks that start by repeating the command.
        overrides = list(HydraConfig.get().overrides.task)
        sys.argv = [sys.argv[0], self.name, *overrides]
        try:
            return load(self.verb).run(cfg)
        except Exception as error:  # the other jobs go on, and the first error ends the command when they are done
            from specbench.cli.errors import sentence

            print(f"{' '.join(sys.argv[1:])}: {sentence(error) or repr(error)}", file=sys.stderr, flush=True)
            raise


def load(verb: Verb) -> Any:
    """The module of a verb."""
    try:
        return importlib.import_module(verb.module)
    except ModuleNotFoundError as error:
        if error.name == verb.module:
            raise ValueError(f"this installation has no {verb.module}: install specbench again") from error
        raise


def _split(name: str, words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options and overrides of a verb."""
    options: dict[str, str] = {}
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        option, _, value = word.partition("=")
        if option in ("-h", "--help"):
            options["help"] = ""
        elif option in ("-m", "--multirun"):
            options["multirun"] = ""
        elif option == "--cfg":
            options["cfg"] = value or next(rest, "job")
        elif word.startswith("-") and not word.startswith("-="):
            from specbench.cli.errors import nearest

            raise ValueError(f"{name} has no option '{option}'{nearest(option, OPTIONS)}; settings are key=value")
        else:
            overrides.append(word)
    return options, overrides


def quiet() -> None:
    """Silence messages of libraries about which a user can do nothing; warnings of SpecBench and errors are kept."""
    import logging
    import warnings

    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "WANDB_ERROR_REPORTING": "false",
        "GIT_TERMINAL_PROMPT": "0",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "httpx", "submitit", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",
        r".*is deprecated, use `isinstance\(treespec.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*You are using a CUDA device .* that has Tensor Cores.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=UserWarning, message=r".*Hydra 1\.4.*")


def _fail(error: BaseException) -> int:
    from specbench.cli.errors import sentence

    if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    said = sentence(error)
    if said is None or os.environ.get("SPECBENCH_DEBUG") == "1":
        traceback.print_exception(error)
    if said is None:
        print("specbench: the error above is a defect of specbench and not of your input", file=sys.stderr)
        return 1
    print(f"specbench: {said}", file=sys.stderr)
    return MISTAKE


if __name__ == "__main__":
    sys.exit(main())

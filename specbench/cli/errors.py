"""One-sentence messages for errors that a user can correct. Any other error is a defect and keeps its traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

STOPPED = "stopped; what was finished is kept, and the same command continues from there"
# Errors of libraries about the content of a file.
UNREADABLE = (ValueError, OSError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, SafetensorError)
FULL = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word that is most similar to `word`, or an empty text.

    A dotted key is also found by its last part: `block_sise` gives `method.block_size`.
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, 1, 0.6)
    if not close:
        tails = {key.rpartition(".")[2]: key for key in reversed(known)}
        close = [tails[tail] for tail in difflib.get_close_matches(word.rpartition(".")[2], tails, 1, 0.7)]
    return f"; did you mean '{close[0]}'?" if close else ""


@contextmanager
def naming(setting: str, value: object) -> Iterator[None]:
    """Context for reading the file that a setting names: errors of libraries that name neither the setting nor the file
    get both. Other errors are not changed."""
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, (ValueError, OSError)) and (str(value) in str(error) or f"{setting}=" in str(error)):
            raise
        said = one_line(str(error)) or "no reason given"
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"{setting}={value} cannot be read: {kind}{said[:400]}") from error


def sentence(error: BaseException) -> str | None:
    """One line for `error`, or None if it is not an error that a user can correct."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return STOPPED
    if full := _full(error):
        return full
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"there is no file or folder {error.filename}"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    if hydra := _hydra(error):
        return hydra
    if isinstance(error, (ValueError, OSError)):
        return one_line(str(error)) or type(error).__name__
    return None


def _full(error: BaseException) -> str | None:
    """Whether a full disk is the cause, anywhere in the chain of exceptions."""
    link: BaseException | None = error
    while link is not None:
        number = getattr(link, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(text in str(link) for text in FULL):
            name = getattr(link, "filename", None)
            where = f" for {Path(name)}" if name else ""
            return f"no space left on the disk{where}: make room and run the same command again, or set root=DIR"
        link = link.__cause__ or link.__context__
    return None


def _hydra(error: BaseException) -> str | None:
    """Errors of composing and of building objects from the configuration."""
    from hydra.errors import HydraException, InstantiationException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, InstantiationException):
        cause = error.__cause__
        key = str(error).rpartition("full_key: ")[2].strip() if "full_key: " in str(error) else "the configuration"
        if isinstance(cause, TypeError) and "argument" in str(cause):
            return f"{key}: {one_line(str(cause))}"
        return sentence(cause) if cause is not None else one_line(str(error))
    if isinstance(error, HydraException):
        text = str(error)
        if "Ambiguous value" in text:
            return f"{text.splitlines()[0].strip()}: put a list in brackets, or add -m to run one job per value"
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            if name.startswith("submitit") and not any(option.startswith("submitit") for option in error.options or ()):
                return "the Slurm launcher is not installed: pip install 'specbench[slurm]'"
            return f"{group or 'configs'} has no option '{name}'{nearest(name, error.options or ())}"
        return one_line(text)
    if isinstance(error, OmegaConfBaseException):
        lines = str(error).splitlines()
        key = next((line.split(":", 1)[1].strip() for line in lines if line.strip().startswith("full_key:")), "")
        return f"{key}: {lines[0]}" if key and key not in lines[0] else lines[0]
    return None


def one_line(text: str) -> str:
    return " ".join(text.split())

"""wandb, kept from hurting the run: no prompt, no hang, no traceback, one run for each run folder.

What it does wrong by default was seen with wandb 0.31: a key without a network blocks `init` for 101 s; SIGTERM, which Slurm
sends to every process, ends its service, and each later call raises; rows that were not flushed (every 15 s) are lost then.
Any call may wait for ever: `teardown` of 0.23 does for a server that does not answer, the others for a service that is stopped.
So each is made in a thread, and waited for only so long (`machine.within`). history.jsonl is therefore the truth, and this a copy of it
for those who like to look at it there.
"""

from __future__ import annotations

import netrc
import os
import re
import secrets
import string
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from dtl.credentials import redacted_line
from dtl.errors import EXIT_STOPPED, UserError
from dtl.files import write_whole
from dtl.machine import NoAnswer, within
from dtl.untrusted import read_text

Setting = Literal["auto", "online", "offline", "off"]
_INIT_SECONDS, _FINISH_SECONDS = 20.0, 30.0  # wandb's own limits; the run waits `_GRACE_SECONDS` longer, for what they leave out
_GRACE_SECONDS, _LOG_SECONDS, _MODEL_SECONDS, _TEARDOWN_SECONDS = 10.0, 20.0, 300.0, 3.0
_FAILURES = (Exception, SystemExit)  # `teardown` ends the program where wandb's service has failed
_EXIT_CODES = {"done": 0, "stopped": EXIT_STOPPED}


@contextmanager
def _arguments_without_secrets() -> Iterator[None]:
    """wandb keeps the program's arguments with the run, and uploads them."""
    before = sys.argv
    sys.argv = [redacted_line(argument) for argument in before]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _without_launch() -> Iterator[None]:
    """wandb's `init` imports half of wandb (a CPU second) to apply inputs of a launch job, which only who has imported that part can have given."""
    kind, name = getattr(sys.modules.get("wandb.sdk.wandb_run"), "Run", None), "_detect_and_apply_job_inputs"
    before = getattr(kind, name, None)
    if before is None or "wandb.sdk.launch.inputs.internal" in sys.modules:
        yield
        return
    setattr(kind, name, lambda run: None)
    try:
        yield
    finally:
        setattr(kind, name, before)


def choose_mode(setting: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """What is really done with a setting (auto, online, offline, off), and why where that needs saying.

    WANDB_MODE=disabled always counts; its other values, and the presence of a key, decide only what `auto` means.
    """
    if setting not in ("auto", "online", "offline", "off"):
        raise UserError(f"tracking.wandb is {setting!r}: it must be auto, online, offline or off")
    wanted = environ.get("WANDB_MODE", "").lower()
    if setting == "off" or wanted == "disabled" or environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "off", ""
    if setting == "auto":
        setting = wanted if wanted in ("online", "offline") else "online" if _key_is_known(environ) else "offline"
    if setting == "online" and not _key_is_known(environ):
        return "offline", "no wandb key is known (`wandb login` stores one), so wandb works offline"
    return setting, ""


class WandbRun:
    """One wandb run, made at once. Every call may fail without harm: the first failure is printed, then wandb is left alone.

    `first_step`: rows of steps before it were logged by an earlier start, and are not logged again.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: str,
        name: str,
        run_id: str | None,
        config: Mapping[str, Any],
        first_step: int,
        log: Callable[[str], None],
    ) -> None:
        self.id = run_id or stored_id(run_dir) or new_id()
        self._print, self._step = log, first_step
        self._run: Any = None
        self._wandb: Any = None
        try:
            store_id(run_dir, self.id)
        except OSError as error:
            log(f"{run_dir / 'wandb' / 'run-id.txt'} cannot be written ({error.strerror}): resumed, this run will be another one in wandb")
        try:
            import wandb
        except Exception as error:  # a broken installation raises anything
            log(f"wandb cannot be imported ({_short(error)}): the run continues without it")
            return
        self._wandb = wandb
        attempts = list(dict.fromkeys([mode, "offline"]))
        while attempts and self._run is None:
            attempt = attempts.pop(0)
            try:
                self._run, where = within(_INIT_SECONDS + _GRACE_SECONDS, partial(self._init, wandb, attempt, run_dir, name, config))
                log(f"wandb: {where}")
            except _FAILURES as error:
                if isinstance(error, NoAnswer):
                    attempts.clear()  # the first attempt's thread is still at it
                log(f"wandb could not start {attempt} ({_short(error)}): {'working offline' if attempts else 'the run continues without it'}")
                self._teardown()  # its service still holds the id for the start that failed

    def log(self, metrics: Mapping[str, float | str], step: int) -> None:
        """Log one row; rows of an earlier step than the last are left out, for wandb cannot take them."""
        if step >= self._step:
            self._step = step
            self._try("logging", lambda: self._run.log(dict(metrics), step=step))

    def summarize(self, values: Mapping[str, float | str]) -> None:
        self._try("logging", lambda: self._run.summary.update(dict(values)))

    def attach(self, pictures: Mapping[str, Path], model: Path | None, step: int) -> None:
        """The report's pictures, under their names, and the model folder as the artifact `model-RUN_ID`."""
        if pictures:
            self._step = max(self._step, step)
            self._try("logging", lambda: self._run.log({name: self._wandb.Image(str(path)) for name, path in pictures.items()}, step=self._step))
        if model is not None:
            self._try("keeping the model", lambda: self._keep(model.resolve()), _MODEL_SECONDS)

    def _keep(self, model: Path) -> None:
        artifact = self._wandb.Artifact(f"model-{self.id}", type="model")
        artifact.add_dir(str(model))
        self._run.log_artifact(artifact)

    def finish(self, state: str) -> None:
        """End the run; one that was stopped to resume later is marked so."""
        if self._wandb is None:
            return
        self._try("ending", lambda: self._finish(state), _FINISH_SECONDS + _GRACE_SECONDS)
        self._teardown()
        self._wandb = self._run = None

    def _finish(self, state: str) -> None:
        if state == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=_EXIT_CODES.get(state, 1))

    def _teardown(self) -> None:
        """The first that it does is to take wandb's exit hook away, which would print a traceback where the service has died, or wait for ever."""
        with suppress(*_FAILURES):
            within(_TEARDOWN_SECONDS, self._wandb.teardown)

    def _init(self, wandb: Any, mode: str, run_dir: Path, name: str, config: Mapping[str, Any]) -> tuple[Any, str]:
        """The run, and where it is."""
        known = wandb.Settings.model_fields if hasattr(wandb.Settings, "model_fields") else {}
        wanted = {
            "init_timeout": _INIT_SECONDS,
            "finish_timeout": _FINISH_SECONDS,
            "x_transaction_log_flush_interval": 1.0,
            "silent": True,
            "console": "off",  # its capture of stdout would break the bar, and our logs are files already
        }
        settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
        with _arguments_without_secrets(), _without_launch():
            wandb.setup(settings)  # from here on it is silent; `init` would be so only after it has printed about the key
            run = wandb.init(
                mode=mode,
                dir=str(run_dir),
                id=self.id,
                resume="allow",
                name=name,
                project=os.environ.get("WANDB_PROJECT", "dtl"),
                config=dict(config),
                settings=settings,
            )
        if mode == "online" and run.resumed:
            self._step = run.step  # the server knows better than we do what arrived
        return run, run.url if run.settings.mode == "online" else f"{run.settings.sync_dir} (`wandb sync` uploads it)"

    def _try(self, doing: str, action: Callable[[], object], seconds: float | None = None) -> None:
        if self._run is None:
            return
        try:
            within(_LOG_SECONDS if seconds is None else seconds, action)
        except _FAILURES as error:
            self._run = None
            if doing == "ending" and isinstance(error, NoAnswer):
                self._print("wandb did not finish in time: `wandb sync` uploads the rest")
            else:
                self._print(f"wandb failed while {doing} ({_short(error)}): the run continues without it, history.jsonl has everything")


def stored_id(run_dir: Path) -> str | None:
    """The wandb run that belongs to a run folder. Under a sweep it is the one that the agent has chosen."""
    if os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
        return os.environ["WANDB_RUN_ID"]
    try:
        found = read_text(run_dir / "wandb" / "run-id.txt", max_bytes=1000).strip()
    except (OSError, UserError):
        return None
    return found if re.fullmatch(r"[\w.-]{1,64}", found) else None


def store_id(run_dir: Path, run_id: str) -> None:
    (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "wandb" / "run-id.txt", lambda file: file.write(f"{run_id}\n".encode()), sync=False)


def new_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _key_is_known(environ: Mapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    path = environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        entry = netrc.netrc(path).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return entry is not None and bool(entry[2])


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__

"""Downloads models from the Hugging Face hub: no file more than is needed, resumed where a connection breaks.

What was downloaded once is taken from the hub's cache when the hub cannot be reached. Nothing here knows settings, and
the token appears in no log and no sentence.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Set
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
from huggingface_hub import constants, errors
from tqdm.auto import tqdm

from app.engine.checkpoints import SUFFIX
from app.engine.folders import CLASSES, INDEX, Kind, read_index, stem
from app.errors import ModelLoadFailed, first_line
from app.sentences import amount

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_REPORTS = 3.0
SILENCE = 60.0
"""Seconds without a byte after which that is said."""
ATTEMPTS = 5
"""Times that a download is taken up again after errors that pass."""
TRY_LATER = {429, *range(500, 600)}
"""Statuses that pass: too many requests from this address, and whatever is wrong with the hub."""
LEFT_AFTER = 900.0
"""Seconds without a byte after which nobody writes to an unfinished file; others may load into the same cache."""
PIECE = 64 * 1024
"""Bytes that are written at a time."""
TEXTS = (".json", ".txt", ".model")
"""Configurations and vocabularies."""

Report = Callable[[str], None]


def download(
    name: str,
    token: str | None,
    report: Report,
    *,
    full_precision: bool = False,
    without_weights: Set[str] = frozenset(),
    cache: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Bring what is needed of a model onto this machine.

    Args:
        name: ``ORGANISATION/NAME``.
        token: of a user who may read it; ``None`` where everybody may.
        report: hears how much has arrived, every few seconds.
        full_precision: take no fp16 files where there are others.
        without_weights: components whose weights are not needed.
        cache: where to keep it; the hub's own cache unless given.
        endpoint: of the hub; the environment's ``HF_ENDPOINT`` unless given.

    Returns:
        The model's folder.

    Raises:
        ModelLoadFailed: naming the model and what to do.
    """
    huggingface_hub.set_client_factory(_make_client)
    # What has come of an unfinished piece is fetched again after a break.
    constants.DOWNLOAD_CHUNK_SIZE = PIECE
    # Its warnings have several lines, and addresses that are signed; those two tell of each address at any level.
    logging.getLogger(huggingface_hub.__name__).setLevel(logging.ERROR)
    for library in ("httpx2", "httpcore2"):
        logging.getLogger(library).setLevel(logging.WARNING)
    where: dict[str, Any] = {"cache_dir": cache, "endpoint": endpoint, "token": token}
    hub = re.sub(r"//[^/]*@", "//", endpoint or constants.ENDPOINT)  # a mirror's address may have a password in it
    unreachable: str | None = None
    try:
        report(f"asking the hub for {name}")
        unreachable = _why_unreachable(name, token, endpoint)
        where["local_files_only"] = unreachable is not None
        folder = _fetch(name, [INDEX], lambda _: None, where)
        if not (folder / INDEX).is_file():
            raise ModelLoadFailed(
                f"{name} on the hub has no {INDEX}: it is not in diffusers' layout; name another with --model_id."
            )
        _remove_leftovers(folder)
        kind, index = read_index(folder)
        sizes = _list_files(name, folder, cache)
        wanted = select_files(sizes, kind, index, full_precision=full_precision, without_weights=without_weights)
        missing = {path: sizes[path] for path in wanted if not (folder / path).exists()}
        if missing:
            logger.info("downloading %d files of %s from the hub", len(missing), name)
        reporter = _Reporter(name, sum(missing.values()), report)
        with reporter.heard_when_silent() if missing else contextlib.nullcontext():
            return _fetch(name, wanted, reporter, where)
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, httpx2.HTTPError, OSError, ValueError) as error:
        raise ModelLoadFailed(_explain(name, token, error, hub, unreachable)) from None


def select_files(
    files: Collection[str],
    kind: Kind,
    index: dict[str, Any],
    *,
    full_precision: bool = False,
    without_weights: Set[str] = frozenset(),
) -> list[str]:
    """Those of a repository's files that the components of a model need: never pickles, never programs.

    Args:
        files: paths in the repository.
        kind: of the model.
        index: its ``model_index.json``.
        full_precision: take no fp16 files where there are others.
        without_weights: components whose weights are not needed.
    """
    patterns = {}
    for name in CLASSES[kind]:
        entry = index.get(name)
        library = entry[0] if isinstance(entry, list) and entry else None
        if name not in without_weights and library in ("diffusers", "transformers"):
            patterns[name] = f"{name}/{stem(library)}"

    def weights(name: str, variant: str) -> list[str]:
        beginning, shard = re.escape(patterns[name]), rf"{re.escape(variant)}-\d+-of-\d+"
        index_name = f"{beginning}\\{SUFFIX}\\.index{re.escape(variant)}\\.json"
        pattern = rf"{beginning}({re.escape(variant)}|{shard})\{SUFFIX}|{index_name}"
        return [path for path in files if re.fullmatch(pattern, path)]

    modules = [name for name in patterns if weights(name, "") or weights(name, ".fp16")]
    half = not full_precision and all(weights(name, ".fp16") for name in modules)
    wanted = {INDEX}
    for name in CLASSES[kind]:
        texts = [path for path in files if path.startswith(f"{name}/") and path.count("/") == 1]
        wanted |= {path for path in texts if path.endswith(TEXTS) and ".index." not in path}
    for name in modules:
        wanted |= set((weights(name, ".fp16") if half else weights(name, "")) or weights(name, ".fp16"))
    return sorted(wanted)


# --- Talking to the hub ----------------------------------------------------------------------------------------


def _why_unreachable(name: str, token: str | None, endpoint: str | None) -> str | None:
    """Why the model has to come from the cache; ``None`` where the hub answers."""
    if constants.is_offline_mode():
        logger.info("HF_HUB_OFFLINE is set: taking %s from the cache", name)
        return "HF_HUB_OFFLINE is set"
    try:
        huggingface_hub.HfApi(endpoint=endpoint, token=token).model_info(name, timeout=30)
        return None
    except (httpx2.TransportError, errors.OfflineModeIsEnabled) as error:
        reason = type(error).__name__
        # These tell of proxies and certificates; what others say may have a token in it.
        if isinstance(error, (httpx2.ConnectError, httpx2.ProxyError, httpx2.UnsupportedProtocol)):
            reason += f": {first_line(error)}"
    except errors.HfHubHTTPError as error:
        if error.response.status_code not in TRY_LATER:
            raise
        reason = f"it answers {error.response.status_code}"
    logger.warning("the hub cannot be reached (%s): taking %s from the cache", reason, name)
    return reason


def _fetch(name: str, files: list[str], hear: Callable[[int], None], where: dict[str, Any]) -> Path:
    attempt = 1
    while True:
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=files, tqdm_class=_bar(hear), **where))
        except (httpx2.TransportError, errors.HfHubHTTPError) as error:
            passes = not isinstance(error, errors.HfHubHTTPError) or error.response.status_code in TRY_LATER
            if attempt == ATTEMPTS or not passes:
                raise
            logger.warning("the connection to the hub broke (%s): taking the download up again", type(error).__name__)
            time.sleep(attempt)
            attempt += 1
        except RuntimeError as error:
            # hf_xet's, which has tried for minutes by then; hosts of its own may be out of reach where the hub is not.
            if constants.HF_HUB_DISABLE_XET:
                raise
            said = re.sub(r"\?[^\s)]*", "", first_line(error))  # no signatures
            logger.warning("the hub's Xet storage failed (%s): going on without it", said)
            constants.HF_HUB_DISABLE_XET = True


def _remove_leftovers(folder: Path) -> None:
    """Remove what starts that were ended while they loaded have left of the files: nothing takes it up again.

    Args:
        folder: of the model's snapshot in the cache.
    """
    for path in folder.parents[1].glob("blobs/*.incomplete"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFT_AFTER:
                path.unlink()
                logger.info("removed %s, which an earlier start did not finish", path)


def _list_files(name: str, folder: Path, cache: Path | None) -> dict[str, int]:
    """Size of every file of the repository, as the download of its index noted them."""
    try:
        listed = huggingface_hub.get_cached_repo_tree(name, cache_dir=cache)
    except errors.CachedRepoTreeNotFoundError:
        there = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.stat().st_size for path in there}
    return {file.path: file.size or 0 for file in listed}


def _make_client() -> httpx2.Client:
    try:
        return httpx2.Client(follow_redirects=True, timeout=60, event_hooks={"response": [_make_resumable]})
    except ImportError:
        raise ModelLoadFailed(
            "ALL_PROXY or HTTPS_PROXY names a SOCKS proxy, for which the package socksio is missing: install it, or "
            "name an HTTP proxy."
        ) from None


def _make_resumable(response: httpx2.Response) -> None:
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = _Resumable(response.stream)


class _Resumable(httpx2.SyncByteStream):
    """Tells a connection that was reset as one that ended early: huggingface_hub resumes after the second alone."""

    def __init__(self, stream: httpx2.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._stream
        except (httpx2.ReadError, httpx2.RemoteProtocolError) as error:
            logger.warning("the connection to the hub broke in the middle of a file: resuming it")
            raise httpx2.RemoteProtocolError(str(error)) from error

    def close(self) -> None:
        self._stream.close()


# --- Telling how far it is -------------------------------------------------------------------------------------


class _Reporter:
    """Adds up bytes and says every few seconds how many there are."""

    def __init__(self, name: str, total: int, report: Report) -> None:
        self._name = name
        self._total = total
        self._report = report
        self._next = 0.0
        self._done = 0

    def __call__(self, done: int) -> None:
        self._done = done
        now = time.monotonic()
        if now < self._next or not self._total:
            return
        self._next = now + SECONDS_BETWEEN_REPORTS
        share = min(100, round(100 * done / self._total))
        self._report(f"downloading {self._name}: {amount(done, self._total)}, {share} %")

    @contextlib.contextmanager
    def heard_when_silent(self) -> Iterator[None]:
        """Inside, it is said where nothing comes: libraries wait and try again for minutes without a word."""
        over = threading.Event()
        listener = threading.Thread(target=self._listen, args=(over,), daemon=True)
        listener.start()
        try:
            yield
        finally:
            over.set()
            listener.join()

    def _listen(self, over: threading.Event) -> None:
        before = 0
        while not over.wait(SILENCE):
            if self._done == before:
                self._report(f"downloading {self._name}: nothing has come for {SILENCE:g} seconds")
                logger.warning("nothing of %s has come for %g seconds; %s", self._name, SILENCE, _other_way())
            before = self._done


def _other_way() -> str:
    if constants.HF_HUB_DISABLE_XET:
        return "check the network and HTTPS_PROXY"
    return "the hub's Xet storage has hosts of its own, which may be out of reach: HF_HUB_DISABLE_XET=1 goes without it"


def _bar(hear: Callable[[int], None]) -> type[Any]:
    """A progress bar that draws nothing and tells `hear` the bytes that have come over the network."""

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            # huggingface_hub also counts files, and bytes once more as they are written.
            self._counts = options.get("desc") == "Downloading bytes"
            super().__init__(*args, **{**options, "file": io.StringIO()})

        def display(self, *_args: Any, **_options: Any) -> None:
            """Nothing."""

        def update(self, n: float | None = 1) -> bool | None:
            result = super().update(n)
            if self._counts:
                hear(int(self.n))
            return result

    return Bar


def _explain(name: str, token: str | None, error: Exception, hub: str, unreachable: str | None) -> str:
    """One sentence for whatever went wrong, and what to do."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    for each in (error, cause):
        if isinstance(each, errors.HfHubHTTPError):
            return _explain_status(name, token, each, hub)
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = f"the hub at {hub} cannot be reached ({unreachable or type(cause).__name__})"
        remedy = "check the network, HTTPS_PROXY and SSL_CERT_FILE, try again later"
        if constants.is_offline_mode():
            why, remedy = "HF_HUB_OFFLINE forbids to ask the hub", "set HF_HUB_OFFLINE=0"
        return f"{name} is not in the cache, or not all of it, and {why}; {remedy}, or name a folder with --model_id."
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return f"There is too little disk space for {name} in {constants.HF_HUB_CACHE}; free some, or set HF_HOME."
    if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return (
            f"{name} cannot be kept in {constants.HF_HUB_CACHE} ({cause.strerror}); set HF_HOME to a folder that "
            "can be written."
        )
    if isinstance(cause, json.JSONDecodeError):
        return f"What answers at {hub} is no hub; check HF_ENDPOINT and proxies."
    said = f"{type(cause).__name__}: {first_line(cause)}"
    return f"{name} could not be downloaded from {hub} ({said}); try again."


def _explain_status(name: str, token: str | None, error: errors.HfHubHTTPError, hub: str) -> str:
    status = error.response.status_code
    site = f"{hub}/{name}"
    if status in (401, 403) and token is None:
        sentence = (
            f"The hub wants a token for {name}, or there is no such model: set HUGGINGFACE_TOKEN to one of a user who "
            f"may read {site}."
        )
    elif isinstance(error, errors.GatedRepoError):
        sentence = (
            f"{name} is gated, and the user of HUGGINGFACE_TOKEN has not been granted access: accept its conditions at "
            f"{site} and start again."
        )
    elif status == 401:
        sentence = f"The hub refuses the token for {name}: check HUGGINGFACE_TOKEN, which may be wrong or have expired."
    elif status == 403:
        sentence = f"The hub denies HUGGINGFACE_TOKEN access to {name}: give the token the right to read {site}."
    elif status == 404:
        sentence = f"There is no model {name} on the hub at {hub}; check its name."
    else:
        sentence = f"The hub at {hub} answers {status} for {name}; try again later."
    return sentence

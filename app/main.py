"""Puts the parts together: settings, engine, transports, one HTTP server. The only place that knows all the others."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI, Response

from app import compile_cache, cores, start, surroundings
from app.api import documentation, edge, oip, requests, stream, v1
from app.api.server import Connection, Server
from app.api.serving import Serving
from app.api.tls import read_certificate
from app.engine.batcher import DEVICE_THREAD, Batcher
from app.engine.family import Family
from app.engine.gpus import count_gpus
from app.engine.ranks import Ranks, check_settings, find_ranks
from app.engine.repository import Model, Repository, State
from app.errors import (
    DeviceLost,
    GenerationFailed,
    InvalidRequest,
    InvalidSettings,
    ModelLoadFailed,
    OutOfMemory,
    RuntimeFault,
    StartupError,
    first_line,
)
from app.generation import GenerateRequest
from app.health import in_url
from app.protocol.oip import MODEL_VERSION
from app.sentences import nearest
from app.settings import Settings
from app.settings_sources import find_termination_log, load_settings, read_other_keys
from app.telemetry import METRICS_CONTENT_TYPE, AccessLog, Telemetry, configure_logging

logger = logging.getLogger(__name__)

DISTRIBUTION = "sdxl-runtime"
DEVICE_LOST = 3
"""Exit code of a process that only a new one can replace."""
OF_LIBRARIES = re.compile("(HF|HUGGINGFACE_HUB|MKL|OMP|SSL_CERT|TRITON)_.+|HTTPS?_PROXY")
"""Variables that look like misspelt settings, and are none."""
OF_THE_MODEL = (
    *(GenerationFailed, InvalidRequest),
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError),
)
"""What is raised where weights and configurations do not go together, while the device and the libraries are whole."""


def create_app(
    settings: Settings,
    load: Callable[[], Family[Any]] | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
    begun: float | None = None,
    ranks: Ranks | None = None,
) -> FastAPI:
    """The whole server as an ASGI application; loading starts with its lifespan.

    Args:
        settings: what to run with.
        load: makes the model family on the device thread; by default what `settings` name.
        on_failure: called from the device thread when the model cannot be loaded, and when the device is lost.
        begun: when the start began, by ``time.monotonic``; now unless given.
        ranks: of this process, where others share its model.
    """
    begun = time.monotonic() if begun is None else begun
    telemetry = Telemetry(settings.model_name)
    ending = threading.Event()

    def report(phase: str) -> None:
        model.phase = phase

    timelines = [start.Timeline(begun) for _ in range(count_replicas(settings))]
    batcher = Batcher(
        [
            load
            or functools.partial(_load_family, settings.for_replica(i, len(timelines)), report, timeline, ranks, ending)
            for i, timeline in enumerate(timelines)
        ],
        telemetry,
        max_queue=settings.max_queue,
        max_batch_size=settings.max_batch_size,
        encode_threads=settings.encode_threads,
        embed_metadata=settings.embed_metadata,
        warm_up=settings.warm_up,
        max_batch_pixels=settings.max_batch_pixels,
        max_queue_seconds=settings.max_queue_seconds,
        step_timeout=settings.step_timeout,
        idempotency_seconds=settings.idempotency_seconds,
        on_lost=on_failure,
        timelines=timelines,
    )
    model = Model(settings.model_name, MODEL_VERSION, batcher, settings.limits, settings.request_timeout)
    repository = Repository([model])

    def loaded(future: Any) -> None:
        error = future.exception()
        if model.state is State.STOPPING:
            return
        if error is None:
            seconds = time.monotonic() - begun
            slowest = max(timelines, key=lambda timeline: timeline.total)
            telemetry.ready.set(1)
            telemetry.started(seconds, slowest.seconds)
            logger.info("model %s is ready after %.1f seconds: %s", model.name, seconds, slowest)
            _warn_of_small_limits(model)
        elif on_failure is not None:
            on_failure(error)

    def stop(grace: float) -> None:
        ending.set()
        telemetry.ready.set(0)
        repository.close(grace)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.ready.add_done_callback(loaded)
        batcher.start()
        yield
        await asyncio.to_thread(stop, settings.grace_period)

    version = _version()
    app = FastAPI(
        title="Stable Diffusion XL Runtime",
        version=version,
        description=documentation.DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.ready = batcher.ready
    app.state.stop, app.state.hurry = stop, repository.hurry  # for a server that goes on answering meanwhile
    serving = Serving(repository, telemetry, settings)
    routers = (
        oip.router(serving, version),
        stream.router(serving),
        requests.router(repository),
        v1.router(serving),
    )
    for router in routers:
        app.include_router(router)
    edge.install_error_handlers(
        app, [route for router in routers for route in router.routes], documented=settings.enable_docs_url
    )
    if settings.enable_docs_url:
        documentation.install(app, settings, model)

    @app.get("/metrics", tags=["Operations"], summary="Prometheus metrics", **documentation.METRICS_ANSWER)
    async def metrics() -> Response:
        return Response(telemetry.exposition(), headers={"Content-Type": METRICS_CONTENT_TYPE})

    api_key = settings.api_key.get_secret_value() if settings.api_key else None
    access_log = AccessLog(settings.access_log_format) if settings.access_log_format else None
    app.add_middleware(
        edge.Edge,
        api_key=api_key,
        access_log=access_log,
        documented=settings.enable_docs_url,
        body_timeout=settings.body_timeout,
    )
    return app


def count_replicas(settings: Settings, count: Callable[[], int] = count_gpus) -> int:
    """How many copies of the model there will be.

    Args:
        settings: with a number, or ``auto``.
        count: tells how many GPUs are visible.
    """
    if settings.replicas != "auto":
        return settings.replicas
    return max(1, count()) if settings.device in ("auto", "cuda") else 1


def _warn_of_small_limits(model: Model) -> None:
    if model.family is None or model.family.only_inpaints:
        return  # a picture has the size of the image that it comes from
    try:
        model.resolve([GenerateRequest(prompt="")])
    except RuntimeFault as fault:
        logger.warning("a request with nothing but a prompt is refused: %s", fault)


def _load_family(
    settings: Settings,
    report: Callable[[str], None],
    timeline: start.Timeline,
    ranks: Ranks | None,
    ending: threading.Event,
) -> Family[Any]:
    from app.engine.mount import wait_for_mount
    from app.engine.weights import load_family

    with timeline.phase("read"):
        wait_for_mount(settings, report)
    family = load_family(settings, report, timeline, ranks)
    with timeline.phase("compile"):
        _warm(family, settings, report, ending)
    report("warming up" if settings.warm_up else "")
    return family


def _warm(family: Family[Any], settings: Settings, report: Callable[[str], None], ending: threading.Event) -> None:
    """Compile, once all sizes are known to be the model's: some take minutes.

    Raises:
        ModelLoadFailed: it cannot paint one of the sizes, the device is too small, or this machine cannot compile.
    """
    for width, height in settings.warm_pictures if settings.compiles else ():
        try:
            family.resolve(family.rehearsal(GenerateRequest(prompt="", width=width, height=height)))
        except InvalidRequest as error:
            raise ModelLoadFailed(f"--warm_sizes names {width}x{height}: {error}") from None
    try:
        with compile_cache.compiling(compile_cache.folder_of(settings), ending):
            family.warm(report)
    except OutOfMemory:
        sizes = ", ".join(settings.warm_sizes) or "the model's own"
        raise ModelLoadFailed(
            f"The device has too little memory to prepare for --warm_sizes ({sizes}); name smaller ones, or take "
            "--optimize safe."
        ) from None


def _version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "0+uninstalled"


# --- The command line ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop.

    Returns:
        The exit code: 0 after a shutdown that was asked for, 1 when the model cannot be loaded, 2 for wrong settings,
        3 when the device is lost and only a new process can use it.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    environment = frozenset(os.environ)
    surroundings.prepare()
    settings: Settings | None = None
    try:
        settings = load_settings(given[1:] if given[:1] == ["serve"] else given)
        configure_logging(settings)
        _hand_over(read_other_keys(), environment)
        cores.share()  # only now: what .env has for OpenMP may leave it nothing to choose
        compile_cache.keep(settings)
        ranks = find_ranks()
        if ranks is not None:
            settings = check_settings(settings, ranks)
            logger.info("torchrun: process %d of %d that share one model", ranks.rank, ranks.size)
            if ranks.rank > 0:
                return _follow(settings, ranks)
        server, failures, ready = _make_server(settings, ranks)
        listener = _listen(settings)
    except InvalidSettings as error:
        surroundings.tell(str(error), settings.termination_log if settings else find_termination_log(given))
        return 2
    code = _serve(settings, server, listener, failures)
    loaded = ready.done() and ready.exception() is None
    if code == 0 and not loaded:
        compile_cache.excuse(compile_cache.folder_of(settings))
    if code == DEVICE_LOST or not loaded or any(thread.name == DEVICE_THREAD for thread in threading.enumerate()):
        # Not loaded, hanging or lost: torch cannot be interrupted, and it may crash an interpreter that ends around it.
        # An interpreter would also wait for all that is left to compile.
        logging.shutdown()
        os._exit(code)
    return code


def _hand_over(variables: Mapping[str, str], environment: Collection[str]) -> None:
    """Give libraries the variables that ``.env`` has for them.

    Args:
        variables: by name.
        environment: names of those that were set when the process began; these stay.
    """
    settings = [name.upper() for name in Settings.model_fields]
    for name, value in variables.items():
        if name not in environment:
            os.environ[name] = value
        hint = "" if OF_LIBRARIES.fullmatch(name.upper()) else nearest(name.upper(), settings)
        level = logging.WARNING if hint else logging.INFO
        found = "libraries find it in the environment"
        if os.environ[name] != value:
            found = "the environment has another value, and libraries find that"
        logger.log(level, ".env has %s, which is no setting%s; %s", name, hint, found)


def _listen(settings: Settings) -> socket.socket:
    try:
        listener = socket.create_server(
            (settings.host, settings.http_port),
            family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET,
            # All addresses are those of IPv4 too, by which a cluster that has both may send its probes.
            dualstack_ipv6=settings.host == "::" and socket.has_dualstack_ipv6(),
            backlog=2048,
        )
        # Its connections have it too. Else the second part of an answer waits for the client to confirm the first, for
        # which many take 40 ms; asyncio sees to it for other listeners alone.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        # What Python says also repeats the address.
        reason = str(error.strerror).split(" (while")[0]
        where = f"{settings.host} port {settings.http_port}"
        raise InvalidSettings(f"Cannot listen on {where} ({reason}); choose another --http_port or --host.") from None


def _follow(settings: Settings, ranks: Ranks) -> NoReturn:
    """Share the work of the process that serves, until that is done."""
    code = 0
    try:
        family = _load_family(settings, lambda _: None, start.Timeline(), ranks, threading.Event())
        # torchrun hands them to all at once; who serves has requests to finish, and says when that is done.
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
        family.follow()
    except StartupError as error:
        surroundings.tell(str(error), settings.termination_log)
        code = 1
    except Exception:
        logger.critical("process %d has lost the others", ranks.rank, exc_info=True)
        code = DEVICE_LOST
    logging.shutdown()
    os._exit(code)  # an interpreter that ends may wait for the others, who are gone


def _make_server(
    settings: Settings, ranks: Ranks | None
) -> tuple[uvicorn.Server, list[BaseException], concurrent.futures.Future[Any]]:
    """The HTTP server, a list that receives the reason when the model cannot be loaded, and what tells when it is.

    Where it cannot, the server stops.
    """
    if settings.event_loop == "uvloop" and importlib.util.find_spec("uvloop") is None:
        raise InvalidSettings("--event_loop is 'uvloop', which is not installed here; install it, or take auto.")
    failures: list[BaseException] = []
    certificate = None
    if settings.ssl_certfile is not None and settings.ssl_keyfile is not None:
        certificate = read_certificate(settings.ssl_certfile, settings.ssl_keyfile)

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, on_failure=stop, begun=start.process_began(), ranks=ranks)
    config = uvicorn.Config(
        app,
        http=functools.partial(Connection, timeout=settings.body_timeout),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        loop=settings.event_loop,
        server_header=False,
        timeout_keep_alive=settings.timeout_keep_alive,
        workers=1,  # or it reads WEB_CONCURRENCY
    )
    server = Server(
        config,
        app.state.stop,
        app.state.hurry,
        settings.grace_period,
        certificate,
        handshake_timeout=settings.body_timeout,
    )
    return server, failures, app.state.ready


def _serve(
    settings: Settings, server: uvicorn.Server, listener: socket.socket, failures: Sequence[BaseException]
) -> int:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        server.should_exit = True

    # Until the server runs and has handlers of its own, and after it has ended.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for name in settings.ignored():
        logger.info("the setting %s is accepted for KServe's sake and does nothing here", name)
    idle = [f"--{name}" for name in ("warm_sizes", "cache_dir") if getattr(settings, name)]
    if idle and not settings.compiles:
        have = "has" if len(idle) == 1 else "have"
        logger.warning("%s %s no effect: only --optimize compile and max compile anything", " and ".join(idle), have)
    host, port = listener.getsockname()[:2]
    scheme = "http" if settings.ssl_certfile is None else "https"
    logger.info("listening on %s://%s:%d, loading model %s", scheme, in_url(host), port, settings.model_name)
    server.run(sockets=[listener])
    if not failures:
        return 0
    if isinstance(failures[0], DeviceLost):
        surroundings.tell(str(failures[0]), settings.termination_log)
        return DEVICE_LOST
    if not isinstance(failures[0], RuntimeFault):
        logger.critical("the model could not be loaded", exc_info=failures[0])
    surroundings.tell(_why(failures[0], settings), settings.termination_log)
    return 1


def _why(error: BaseException, settings: Settings) -> str:
    """Why the model cannot be served, in one sentence about the model.

    What a damaged model raises on its way to the first picture speaks to programmers, or to callers who asked for one.
    """
    # What torch raises is that error itself; its subclasses are about memory, the device and other processes.
    of_the_model = isinstance(error, OF_THE_MODEL) or type(error) is RuntimeError
    if isinstance(error, OutOfMemory) or not of_the_model:
        return str(error)
    said = first_line(error)
    # What callers may do about it follows a semicolon.
    said = said.partition(";")[0] if isinstance(error, RuntimeFault) else f"{type(error).__name__}: {said}"
    model = str(settings.single_file_model or settings.model_id)
    if settings.use_refiner:
        model += f" with the refiner {settings.refiner_single_file_model or settings.refiner_id or 'of the demo'}"
    return (
        f"{model} cannot paint a picture: its weights or its configuration are probably damaged, or of a kind that is "
        f"not served ({said}); download it again, or try another --dtype or model."
    )

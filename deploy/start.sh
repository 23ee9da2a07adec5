# shellcheck shell=sh
# Read by the start scripts beside it. They say what is served; this says how: by `run FLAG...`.
#
#   MODELS   folder with the weights (default: models in the working directory)
#   IMAGE    serve from this image with podman; without it, the sdxl-runtime of this machine serves: the one on the PATH,
#            or else the one that `make install` puts into .venv
#   PORT     where to listen (default: what .env says, or 8080; with IMAGE 8080)
#   GPU      with IMAGE: none leaves the GPUs out
#   CACHE    with IMAGE: volume for what is loaded from the Hugging Face hub (default: sdxl-huggingface)
#
# Settings of the server may be given as flags behind the script's name, which win over the script's own, and in a file
# .env in the working directory; env.example is one.

named=${MODELS:-}
MODELS=${MODELS:-$PWD/models}

# podman takes a path that does not start with / for the name of a volume.
case $MODELS in
/*) ;;
*) MODELS=$PWD/$MODELS ;;
esac

# The folder as the server sees it; the scripts read it.
# shellcheck disable=SC2034
if [ -n "${IMAGE:-}" ]; then models=/mnt/models; else models=$MODELS; fi

# podman parts what it mounts at colons.
refuse_colon() {
    case $1 in
    *:*)
        echo "podman cannot mount a path with a colon in it: $1" >&2
        exit 2
        ;;
    esac
}

run() {
    if [ -z "${IMAGE:-}" ]; then
        server=sdxl-runtime
        if ! command -v "$server" >/dev/null; then
            server=$(dirname "$(readlink -f "$0")")/../.venv/bin/sdxl-runtime
            if [ ! -x "$server" ]; then
                echo "There is no sdxl-runtime on the PATH or in .venv: run make install, or name an IMAGE." >&2
                exit 127
            fi
        fi
        # Without PORT the server chooses, by .env and by whether it has a certificate.
        exec "$server" ${PORT:+--http_port "$PORT"} "$@"
    fi
    # The server would wait a minute for the folder to be mounted, and knows it by another name.
    if [ ! -d "$MODELS" ]; then
        if [ -n "$named" ]; then
            echo "MODELS names a folder that is not there: $MODELS" >&2
            exit 2
        fi
        # Not all that is served comes from there, and flags behind the script's name may have named something else.
        case $* in
        *"$models"/*) echo "There is no $MODELS to mount as $models; name another folder as MODELS." >&2 ;;
        esac
    fi
    set -- "$IMAGE" "$@"
    if [ -f .env ]; then
        refuse_colon "$PWD/.env"
        # The container's user is of group 0, and for podman without root that is the caller's own group.
        if [ -z "$(find -L .env -perm -040)" ]; then
            echo "The container's user may not read .env; chmod g+r .env lets it." >&2
        fi
        set -- --volume "$PWD/.env:/etc/sdxl-runtime/.env:ro,Z" "$@"
    fi
    if [ -d "$MODELS" ]; then
        refuse_colon "$MODELS"
        set -- --volume "$MODELS:/mnt/models:ro,Z" "$@"
    fi
    if [ "${GPU:-all}" != none ]; then set -- --device nvidia.com/gpu=all "$@"; fi
    if [ "${HF_HUB_OFFLINE:-1}" = 0 ]; then
        set -- --env HF_HUB_OFFLINE=0 --env HF_HOME=/cache --volume "${CACHE:-sdxl-huggingface}:/cache:U" "$@"
    fi
    # Taken over from here where they are set.
    set -- --env HF_TOKEN --env HUGGINGFACE_TOKEN "$@"
    # The port that is published, whatever .env says; not as a flag, because the image's HEALTHCHECK reads it too.
    set -- --env HTTP_PORT=8080 "$@"
    # As in a cluster: a root file system that cannot be written, and time for running requests at the end.
    exec podman run --rm --read-only --tmpfs /tmp --shm-size 1g --stop-timeout 60 --publish "${PORT:-8080}:8080" "$@"
}

#!/usr/bin/env bash
# Decides where the model's code will run on this machine and writes it to .cache/sandbox_backend:
#   docker   a daemon answers and our image is current (it is built here when it is not)
#   bwrap    no daemon, but bubblewrap works; installed through apt when that needs no password
#   process  neither: no isolation at all. Said loudly, never chosen silently.
# ASTER_SANDBOX_BACKEND=docker|bwrap|process overrides the choice, and then what it needs must be there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
wanted=${ASTER_SANDBOX_BACKEND:-}
mkdir -p .cache

red() { if [ -t 2 ]; then printf '\033[1;31m%s\033[0m\n' "$*" >&2; else printf '%s\n' "$*" >&2; fi; }
choose() {
    if [ "$(cat .cache/sandbox_backend 2>/dev/null)" != "$1" ] || [ "${CI:-}" = true ]; then echo "sandbox backend: $1"; fi
    echo "$1" > .cache/sandbox_backend
    exit 0
}

docker_answers() {
    timeout 20 "$python" -c 'import docker; docker.from_env(timeout=10).ping()' >/dev/null 2>&1
}
# The flags that the backend relies on; inside a container with default seccomp this fails although bwrap is installed.
bwrap_works() {
    command -v bwrap >/dev/null && timeout 20 bwrap --unshare-all --die-with-parent --ro-bind / / --proc /proc --dev /dev \
        --tmpfs /tmp --cap-drop ALL true >/dev/null 2>&1
}
install_bubblewrap() {
    command -v apt-get >/dev/null || return 1
    local sudo=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null && sudo -n true 2>/dev/null || return 1
        sudo=(sudo -n)
    fi
    echo "installing bubblewrap (no Docker daemon answers)"
    # A fresh machine has no package lists; an old one may have stale ones.
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends bubblewrap \
        >.cache/apt.log 2>&1 </dev/null && return 0
    {
        "${sudo[@]}" apt-get update -qq &&
            "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends bubblewrap
    } >>.cache/apt.log 2>&1 </dev/null
}

case "$wanted" in
    process) choose process ;;
    bwrap) bwrap_works || { red "ASTER_SANDBOX_BACKEND=bwrap, but bubblewrap does not work here: apt-get install bubblewrap"; exit 1; }
        choose bwrap ;;
    docker) docker_answers || { red "ASTER_SANDBOX_BACKEND=docker, but no Docker daemon answers (docker info)"; exit 1; }
        "$python" -m sandbox_image.build
        choose docker ;;
    "") ;;
    *) red "ASTER_SANDBOX_BACKEND=$wanted is none of docker, bwrap, process"; exit 1 ;;
esac

if docker_answers; then
    if "$python" -m sandbox_image.build; then choose docker; fi
    red "The sandbox image could not be built (see above); going on with bubblewrap. make image tries again."
fi
if bwrap_works || { install_bubblewrap && bwrap_works; }; then choose bwrap; fi
red "No Docker daemon and no working bubblewrap: going on with the 'process' backend, which has NO isolation: the model's code runs as $(id -un), with your files and your network. Cure: install Docker, or apt-get install bubblewrap."
choose process

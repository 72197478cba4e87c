#!/usr/bin/env bash
# Builds Dockerfile.cpu and Dockerfile for real, without a Docker engine and without the registries of the base images, and trains in the first.
#
#     bash tests/ops/images.sh DIR           # DIR keeps the work (some GB); made when missing
#
# The base images are stand-ins under the real names, made from Debian packages by mmdebstrap. The one for NVIDIA's image holds torch without CUDA and Transformer
# Engine's Python over the emulated extension of tests/fp8, so that what is built on it really imports. It says nothing about NVIDIA's image itself.
#
# Needs root, and buildah and mmdebstrap (apt-get install buildah mmdebstrap). VOLUMES="/a:/a:ro ..." adds volumes to the builds, e.g. of a package mirror.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=${1:?name a folder for the work: bash tests/ops/images.sh DIR}
for program in buildah mmdebstrap; do
    if ! command -v "$program" >/dev/null; then
        echo "[images] $program is missing: apt-get install --no-install-recommends buildah mmdebstrap" >&2
        exit 77
    fi
done
if [ "$(id -u)" -ne 0 ]; then
    echo "[images] building needs root" >&2
    exit 77
fi
mkdir -p "$work"
work=$(cd "$work" && pwd)
say() { printf '\n[images] %s\n' "$*"; }

echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$work/policy.json"
buildah=(buildah --storage-driver vfs --root "$work/store" --runroot "$work/run")
volumes=()
for file in /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
    if [ -e "$file" ]; then volumes+=(--volume "$file:$file:ro"); fi
done
for volume in ${VOLUMES:-}; do volumes+=(--volume "$volume"); done

# What RUN sees of the network settings.
run() { "${buildah[@]}" run --isolation chroot "${volumes[@]}" "$@"; }
build() { "${buildah[@]}" bud --isolation chroot --pull-never --layers=false --signature-policy "$work/policy.json" "${volumes[@]}" "$@"; }
commit() { "${buildah[@]}" commit --quiet --rm --signature-policy "$work/policy.json" "$@"; }

if [ ! -e "$work/rootfs.tar" ]; then
    say "a root file system with Debian's Python"
    mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv bookworm "$work/rootfs.part.tar"
    mv "$work/rootfs.part.tar" "$work/rootfs.tar"
fi

cpu_base=docker.io/library/$(sed -n 's/^ARG BASE=//p' "$root/Dockerfile.cpu")
nvidia_base=$(sed -n 's/^ARG BASE=//p' "$root/Dockerfile")

say "stand-in for $cpu_base"
container=$("${buildah[@]}" from scratch)
"${buildah[@]}" add --quiet "$container" "$work/rootfs.tar" / >/dev/null
run "$container" -- sh -c 'ln -sf python3 /usr/bin/python && rm -f /usr/lib/python3*/EXTERNALLY-MANAGED'
commit "$container" "$cpu_base" >/dev/null

say "Dockerfile.cpu"
begin=$SECONDS
build --file "$root/Dockerfile.cpu" --build-arg TORCH_INDEX="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" --tag megatron_chatflow:cpu "$root"
say "Dockerfile.cpu built in $((SECONDS - begin)) s"

say "the quickstart in it, as its user"
container=$("${buildah[@]}" from --pull-never megatron_chatflow:cpu)
begin=$SECONDS
"${buildah[@]}" run --isolation chroot --hostname localhost "$container" -- bash /opt/megatron_chatflow/examples/quickstart/run.sh | tee "$work/quickstart.log"
"${buildah[@]}" run --isolation chroot --hostname localhost "$container" -- sh -c 'id -un && chatflow doctor'
"${buildah[@]}" rm "$container" >/dev/null
say "the quickstart took $((SECONDS - begin)) s"

say "stand-in for $nvidia_base"
container=$("${buildah[@]}" from --pull-never "$cpu_base")
"${buildah[@]}" copy --quiet "$container" "$root/tests/fp8/emulation" /opt/standin/tests/fp8/emulation >/dev/null
"${buildah[@]}" copy --quiet "$container" "$root/tests/ops/standin/emulated_transformer_engine.py" /opt/standin/ >/dev/null
"${buildah[@]}" copy --quiet "$container" "$root/requirements.txt" "$root/requirements-oracle.txt" /tmp/ >/dev/null
run "$container" -- sh -c "pip install --quiet --no-cache-dir --root-user-action=ignore --extra-index-url '${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}' \
    \$(grep -E '^(torch|numpy)==' /tmp/requirements.txt) packaging \
    && pip install --quiet --no-cache-dir --root-user-action=ignore --no-deps --requirement /tmp/requirements-oracle.txt \
    && packages=\$(python -c 'import site; print(site.getsitepackages()[0])') \
    && cp /opt/standin/emulated_transformer_engine.py \"\$packages\" && echo import emulated_transformer_engine > \"\$packages/emulated.pth\" \
    && mkdir -p /etc/pip && pip freeze > /etc/pip/constraint.txt && rm /tmp/requirements*.txt"
"${buildah[@]}" config --env PIP_CONSTRAINT=/etc/pip/constraint.txt "$container"
commit "$container" "$nvidia_base" >/dev/null

say "Dockerfile"
begin=$SECONDS
build --file "$root/Dockerfile" --tag megatron_chatflow:cuda "$root"
say "Dockerfile built in $((SECONDS - begin)) s"
container=$("${buildah[@]}" from --pull-never megatron_chatflow:cuda)
"${buildah[@]}" run --isolation chroot --hostname localhost "$container" -- sh -c 'id -un && chatflow --version && chatflow doctor'
"${buildah[@]}" rm "$container" >/dev/null
say "done: both images are built; the quickstart's log is $work/quickstart.log"

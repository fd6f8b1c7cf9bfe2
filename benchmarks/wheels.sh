#!/usr/bin/env bash
# Makes .whl/: what tiglon needs and a GPU machine without network lacks, whose Python 3.12 has torch, triton, transformers, pytest,
# safetensors, sentencepiece, pyarrow, tensorboard, typer and rich. Run it here, where packages can be had; then take the tree along.
#
#     bash benchmarks/wheels.sh                   # tiglon's needs and those of its tests (not an object store's)
#     bash benchmarks/wheels.sh litgpt plots      # and the peer litgpt, and matplotlib, each with what it imports
#
# On that machine, in the root of the tree:
#
#     python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site .whl/*.whl && export PYTHONPATH=/tmp/site
#     python3 -m launch.train my.toml             # and pytest -m gpu, python -m benchmarks.step, ...
#
# PYTHON names the Python that fetches, 3.11 or newer; what it fetches is for 3.12 on x86-64. Versions are those of pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=64 # MiB of wheels and tracked files: what a machine takes along
"$python" -c 'import sys, tomllib, pip' 2>/dev/null || { echo "wheels: $python has to be Python 3.11 or newer with pip; PYTHON=... names another" >&2; exit 2; }

pure=(deepspeed)                                                            # published as source, pure Python unless told otherwise
whole=(pydantic)                                                            # with all it needs: it fits one pydantic-core only
alone=(megatron-core hjson einops msgpack py-cpuinfo psutil ninja)          # the other needs of tiglon, Megatron-Core and DeepSpeed
alone+=(pytest-timeout pytest-xdist execnet hypothesis sortedcontainers allpairspy lion-pytorch) # of the tests
for word in "$@"; do
    case $word in
        litgpt) alone+=(litgpt lightning pytorch-lightning lightning-utilities torchmetrics jsonargparse) ;;
        plots) alone+=(matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six) ;;
        *) echo "wheels: unknown word $word; litgpt and plots are known" >&2; exit 2 ;;
    esac
done

made=.whl/new # in place of what is there when it is whole
rm -rf $made && mkdir -p $made
# NAME as pyproject.toml asks for it, "megatron-core==0.16.1"; the bare name of what it does not name itself.
asked() {
    "$python" - "$@" <<'P'
import re, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lines = [line for group in (project["dependencies"], *project["optional-dependencies"].values()) for line in group]
known = {re.match(r"[\w.-]+", line)[0]: line for line in lines}
print(*(known.get(name, name) for name in sys.argv[1:]), sep="\n")
P
}
fetch() {
    local platforms=() glibc
    for glibc in 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    for glibc in 2014 2010 1; do platforms+=(--platform "manylinux${glibc}_x86_64"); done
    "$python" -m pip --disable-pip-version-check download --quiet --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --dest $made "$@"
}
mapfile -t names < <(asked "${whole[@]}") && fetch "${names[@]}"
mapfile -t names < <(asked "${alone[@]}") && fetch --no-deps "${names[@]}"
mapfile -t names < <(asked "${pure[@]}")
DS_BUILD_OPS=0 "$python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir $made "${names[@]}"

# tiglon's name and version without its code: a checkpoint records them, and the code is the tree's, which may change after this.
"$python" - <<'P'
import tomllib, zipfile

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
name, version = project["name"], project["version"]
folder = f"{name}-{version}.dist-info"
files = {
    "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {project['description']}\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: benchmarks/wheels.sh\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}
with zipfile.ZipFile(f".whl/new/{name}-{version}-py3-none-any.whl", "w") as wheel:
    for file, text in files.items():
        wheel.writestr(f"{folder}/{file}", text)
    wheel.writestr(f"{folder}/RECORD", "".join(f"{folder}/{file},,\n" for file in (*files, "RECORD")))
P

rm -f .whl/*.whl && mv $made/*.whl .whl && rmdir $made

mib() { awk '{ total += $1 } END { printf "%.1f", total / 1048576 }'; }
(cd .whl && stat --format '%s %n' ./*.whl) | awk '{ printf "%8.2f MiB  %s\n", $1 / 1048576, substr($2, 3) }'
wheels=$(stat --format %s .whl/*.whl | mib)
tracked=$(git ls-files -z 2>/dev/null | xargs -0 --no-run-if-empty stat --format %s | mib)
all=$(printf '%s\n' "$wheels" "$tracked" | awk '{ total += $1 } END { printf "%.1f", total }')
echo "$wheels MiB of wheels, $tracked MiB of tracked files: $all of $limit MiB"
awk "BEGIN { exit !($all <= $limit) }" || { echo "wheels: $all MiB is more than the $limit MiB that travel; leave words away" >&2; exit 1; }

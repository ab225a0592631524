#!/usr/bin/env bash
# From nothing to checkpoints/smollm2-135m: base, three trainings, tables and figures, probes.
#
# Works for about MINUTES (default 9), then stops with exit code 75; the next call goes on where this one ended. Exit code 0:
# all is done; any other: something is wrong. DATA is the folder of train_real.txt.gz, train_numeric.txt.gz, valid.txt, test.txt
# and gsm_hard.txt; the recipes read it as data/gsm. What is under way lies in runs/smollm2, what is finished is copied to
# checkpoints/smollm2-135m at once.
#
#   [PYTHON=python3] [COST_DEVICES="cuda cpu"] tools/smollm2.sh [MINUTES] [DATA]
set -euo pipefail
minutes=${1:-9} data=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.."
python=${PYTHON:-python} recipes=rim_probe/training/recipes work=runs/smollm2 out=checkpoints/smollm2-135m

fail() {
    echo "$1" >&2
    exit 2
}
left() { # minutes that remain of this call
    awk -v m="$minutes" -v s=$SECONDS 'BEGIN { printf "%.2f", m - s / 60 }'
}
over() {
    echo "Time is up; call again."
    exit 75
}
enough() { # is there time for a piece that needs so many minutes to begin with?
    awk -v l="$(left)" -v need="$1" 'BEGIN { exit !(l >= need) }' || over
}
train() { # method, and where its finished folder is copied to
    if [ ! -e $work/$1/adapter_config.json ]; then
        enough 0.7
        "$python" -m rim_probe train $recipes/smollm2-$1.yaml --output $work/$1 --resume --max-minutes "$(left)" || exit $?
    fi
    mkdir -p $2 && cp -r $work/$1/. $2/
}
boxed() { # a command that keeps what is done when it is interrupted, and goes on when it is called again
    local code=0
    enough 1
    timeout --preserve-status -k 30 -s INT "$(left)m" "$@" || code=$?
    [ $code != 130 ] || over
    [ $code = 0 ] || exit $code
}

awk -v m="$minutes" 'BEGIN { exit !(m + 0 >= 2) }' || fail "MINUTES must be a number from 2 on, not $minutes."
if [ -n "$data" ]; then
    [ -L data/gsm ] || [ ! -e data/gsm ] || fail "data/gsm is there already; leave DATA out to use it, or move it away."
    mkdir -p data && ln -sfn "$data" data/gsm
fi
for file in train_real.txt.gz train_numeric.txt.gz valid.txt test.txt gsm_hard.txt; do
    [ -e data/gsm/$file ] || fail "data/gsm/$file is missing; give the folder that holds it as the second argument."
done

"$python" -m rim_probe base smollm2-135m
train memory $out
train direct $out/direct
train cot $out/cot

devices=${COST_DEVICES:-$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
[ -e $work/metrics.json ] || boxed "$python" -m rim_probe eval $out --data GSM8K=data/gsm/test.txt \
    GSM-Hard=data/gsm/gsm_hard.txt valid=data/gsm/valid.txt --cost-devices $devices --output $work/metrics.json
cp $work/metrics.json $out/
"$python" -m rim_probe eval --from $out/metrics.json --figures docs/smollm2-135m --card README.md $out/README.md >/dev/null

# Fitted on training rows and on parts of the validation file; the test file is only reported on.
mkdir -p $work/problems
zcat data/gsm/train_real.txt.gz | awk 'NR % 10 == 1' >$work/problems/fit.txt
awk -v to=$work/problems 'NR <= 250 { print > (to "/choose.txt") }
    NR > 250 && NR <= 400 { print > (to "/fit-heldout.txt") }
    NR > 400 { print > (to "/choose-heldout.txt") }' data/gsm/valid.txt
boxed "$python" -m rim_probe probe $out --output $work/probes --data data/gsm/test.txt --fit $work/problems/fit.txt \
    --choose $work/problems/choose.txt --fit-heldout $work/problems/fit-heldout.txt \
    --choose-heldout $work/problems/choose-heldout.txt --card $out/README.md
cp -r $work/probes $out/
echo "All done: $out."

#!/usr/bin/env bash
# From nothing to checkpoints/smollm2-135m: base, three trainings, tables and figures, probes.
#
# Works for about MINUTES (default 9), then stops with exit code 75; the next call goes on where this one ended, to the bit.
# Exit code 0: all is done. DATA is the folder of train_real.txt.gz, train_numeric.txt.gz, valid.txt, test.txt and
# gsm_hard.txt; the recipes read it as data/gsm.
#
#   tools/smollm2.sh [MINUTES] [DATA]
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-9} data=${2:-data/gsm}
recipes=rim_probe/training/recipes out=checkpoints/smollm2-135m parts=runs/smollm2-probe-data

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
train() { # a recipe, and the file that says that its last stage is done
    [ ! -e "$2" ] || return 0
    enough 0.7
    python -m rim_probe train "$recipes/$1.yaml" --resume --max-minutes "$(left)"
    [ -e "$2" ] || over
}
boxed() { # a command that keeps what is done when it is interrupted, and goes on when it is called again
    local code=0
    enough 1
    timeout --preserve-status -s INT "$(left)m" "$@" || code=$?
    [ $code != 130 ] || over
    [ $code = 0 ] || exit $code
}

[ "$data" = data/gsm ] || { mkdir -p data && ln -sfn "$(realpath "$data")" data/gsm; }
python -m rim_probe base smollm2-135m
train smollm2-memory $out.run/stage2/done
train smollm2-direct $out/direct.run/direct-sft/done
train smollm2-cot $out/cot.run/cot-sft/done

if [ ! -e $out/metrics.json ]; then
    devices=$(python -c 'import torch; print("cuda cpu" if torch.cuda.is_available() else "cpu")')
    boxed python -m rim_probe eval $out --data GSM8K=data/gsm/test.txt GSM-Hard=data/gsm/gsm_hard.txt \
        valid=data/gsm/valid.txt --cost-devices $devices --output $out/metrics.json --figures docs/smollm2-135m \
        --card README.md $out/README.md
fi

# Fitted on training rows and on two parts of the validation file; the test file is only reported on.
if [ ! -e $parts/done ]; then
    mkdir -p $parts
    zcat data/gsm/train_real.txt.gz | awk 'NR % 5 == 1' >$parts/fit.txt
    sed -n 1,250p data/gsm/valid.txt >$parts/choose.txt
    sed -n 251,400p data/gsm/valid.txt >$parts/fit-heldout.txt
    sed -n 401,500p data/gsm/valid.txt >$parts/choose-heldout.txt
    touch $parts/done
fi
boxed python -m rim_probe probe $out --data data/gsm/test.txt --fit $parts/fit.txt --choose $parts/choose.txt \
    --fit-heldout $parts/fit-heldout.txt --choose-heldout $parts/choose-heldout.txt --card $out/README.md
echo "All done: $out."

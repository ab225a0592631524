#!/usr/bin/env bash
# From nothing to checkpoints/smollm2-135m: base, three trainings, tables and figures, probes.
#
# Works for about MINUTES (default 9) and stops; the next call goes on where this one ended, to the bit. Exit code 0: all
# is done; 75: time is up, call again. DATA is the folder of train_real.txt.gz, train_numeric.txt.gz, valid.txt, test.txt and
# gsm_hard.txt; the recipes read it as data/gsm.
#
#   tools/smollm2.sh [MINUTES] [DATA]
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-9} data=${2:-data/gsm} began=$SECONDS
recipes=rim_probe/training/recipes out=checkpoints/smollm2-135m

left() { # minutes that remain of this call
    awk -v m="$minutes" -v s=$((SECONDS - began)) 'BEGIN { printf "%.2f", m - s / 60 }'
}
enough() { # is there time for a piece of so many minutes?
    awk -v l="$(left)" -v need="$1" 'BEGIN { exit !(l >= need) }' || { echo "Time is up; call again."; exit 75; }
}
train() { # recipe, and the file that says that its last stage is done
    [ -e "$2" ] && return
    enough 0.5
    python -m rim_probe train "$recipes/$1.yaml" --resume --max-minutes "$(left)"
    [ -e "$2" ] || { echo "Time is up; call again."; exit 75; }
}

[ "$data" = data/gsm ] || { mkdir -p data && ln -sfn "$(realpath "$data")" data/gsm; }
python -m rim_probe base smollm2-135m
train smollm2-memory $out.run/stage2/done
train smollm2-direct $out/direct.run/direct-sft/done
train smollm2-cot $out/cot.run/cot-sft/done

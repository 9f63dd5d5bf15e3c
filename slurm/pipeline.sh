#!/usr/bin/env bash
# Check everything on the login node, then queue all stages with their dependencies. See --help.

set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/common.sh
source "$REPO/slurm/common.sh"

usage() {
    cat <<'TEXT'
usage: slurm/pipeline.sh [SETTINGS_FILE] [flags] [-- sbatch options for all jobs]

Queues features -> train -> generate (and controls) -> evaluate -> report on SLURM, each after what
it needs has succeeded. First every stage's flags and inputs are checked here: a mistake is told
before anything is queued. The same call again resumes: finished parts are left alone. The jobs run
this checkout as it is when they start: leave it as it is until they have ended.

  --data DIR           THINGS-EEG2: Preprocessed_data_250Hz/, training_images/, test_images/
  --out DIR            everything is written here; logs in DIR/slurm
  --sdxl FILE|DIR      sd_xl_base_1.0.safetensors
  --ip_adapter FILE    ip-adapter_sdxl_vit-h.safetensors
  --subjects "A B"     default: all in DATA
  --shards N           array tasks that draw each subject's pictures (default: 8)
  --joint              one model for all subjects; default: one model per subject
  --leave_out          for each subject the model of all others, to score strangers
  --controls "A B"     also draw and score these, e.g. "shuffled_eeg true_embedding"
  --at_once N          at most N tasks of an array run at a time; default: as many as SLURM allows
  --venv DIR           python environment (default: .venv of the repository, if there is one)
  --partition P, --account A
  --gres G             of all stages but the report (default: gpu:1)
  --dry_run            check, and show what would be submitted; submit and write nothing

Each flag is also a setting (DATA, OUT, SDXL, IP_ADAPTER, SUBJECTS, SHARDS, JOINT=1, LEAVE_OUT=1,
CONTROLS, AT_ONCE, VENV, PARTITION, ACCOUNT, GRES) of SETTINGS_FILE (see slurm/settings.example) or of the
environment; flags win over the file, the file over the environment. Only there, for each STAGE of
FEATURES, TRAIN, GENERATE, EVALUATE and REPORT:
  STAGE_FLAGS          more flags of the stage, e.g. TRAIN_FLAGS="--epochs 100 --batch_size 16"
  STAGE_SBATCH         more sbatch options of its jobs, e.g. TRAIN_SBATCH="--time=24:00:00", or
                       FEATURES_SBATCH="--array=1-4": four jobs share the stimuli

example:
  slurm/pipeline.sh --data DATA --out OUT --sdxl sd_xl_base_1.0.safetensors \
      --ip_adapter ip-adapter_sdxl_vit-h.safetensors --controls "shuffled_eeg true_embedding" \
      --partition gpu --dry_run
TEXT
}

SETTINGS="DATA OUT SDXL IP_ADAPTER SUBJECTS SHARDS JOINT LEAVE_OUT CONTROLS AT_ONCE VENV"
SETTINGS+=" PARTITION ACCOUNT GRES"
for stage in FEATURES TRAIN GENERATE EVALUATE REPORT; do
    SETTINGS+=" ${stage}_FLAGS ${stage}_SBATCH"
done

# refuse WHAT CURE: nothing has been submitted yet
refuse() {
    printf 'pipeline.sh: error: %s\n  cure: %s\nNothing was submitted.\n' "$1" "$2" >&2
    exit 2
}

absolute() {
    if [[ -z $1 || $1 == /* ]]; then echo "$1"; else echo "$PWD/$1"; fi
}

# ---------------------------------------------------------------- settings

read_settings_file() {
    local name
    [[ -r $1 ]] || refuse "settings file $1: no such file" "see slurm/settings.example"
    # A misspelt name would be ignored without a word. (The last line may lack its line end.)
    while read -r name || [[ -n $name ]]; do
        [[ " $SETTINGS " == *" $name "* ]] ||
            refuse "$1: unknown setting $name" "known are: $SETTINGS"
    done < <(sed -n 's/^[[:space:]]*\(export[[:space:]]\+\)\?\([A-Za-z_][A-Za-z_0-9]*\)=.*/\2/p' "$1")
    # shellcheck source=/dev/null
    source "$1"
}

read_flags() {
    EXTRA=() DRY_RUN=""
    while (($#)); do
        case $1 in
            -h | --help) usage; exit 0 ;;
            --joint) JOINT=1; shift; continue ;;
            --leave_out) LEAVE_OUT=1; shift; continue ;;
            --dry_run) DRY_RUN=1; shift; continue ;;
            --) shift; EXTRA=("$@"); return ;;
            --data | --out | --sdxl | --ip_adapter | --subjects | --shards | --controls | --at_once | \
                --venv | --partition | --account | --gres) ;;
            *) refuse "unknown argument $1" "see slurm/pipeline.sh --help" ;;
        esac
        (($# > 1)) || refuse "$1 needs a value" "see slurm/pipeline.sh --help"
        case $1 in
            --data) DATA=$2 ;;
            --out) OUT=$2 ;;
            --sdxl) SDXL=$2 ;;
            --ip_adapter) IP_ADAPTER=$2 ;;
            --subjects) SUBJECTS=$2 ;;
            --shards) SHARDS=$2 ;;
            --controls) CONTROLS=$2 ;;
            --at_once) AT_ONCE=$2 ;;
            --venv) VENV=$2 ;;
            --partition) PARTITION=$2 ;;
            --account) ACCOUNT=$2 ;;
            --gres) GRES=$2 ;;
        esac
        shift 2
    done
}

settle() {
    local name folder
    for name in DATA OUT SDXL IP_ADAPTER; do
        [[ -n ${!name:-} ]] || refuse "--${name,,} is missing" "see slurm/pipeline.sh --help"
    done
    if [[ -z ${VENV:-} && -d $REPO/.venv ]]; then VENV=$REPO/.venv; fi
    DATA=$(absolute "$DATA") OUT=$(absolute "$OUT") SDXL=$(absolute "$SDXL")
    IP_ADAPTER=$(absolute "$IP_ADAPTER") VENV=$(absolute "${VENV:-}")
    if [[ -z ${SUBJECTS:-} ]]; then
        SUBJECTS=""
        for folder in "$DATA"/Preprocessed_data_250Hz/sub-*/; do
            [[ ! -d $folder ]] || SUBJECTS+=" $(basename "$folder")"
        done
    fi
    read -r -a SUBJECT_NAMES <<<"$SUBJECTS"
    read -r -a CONTROL_NAMES <<<"${CONTROLS:-}"
    SHARDS=${SHARDS:-8} GRES=${GRES:-gpu:1} JOINT=${JOINT:-} CONTROLS=${CONTROLS:-} CONTROL=""
    LEAVE_OUT=${LEAVE_OUT:-}
    export DATA OUT SDXL IP_ADAPTER VENV SUBJECTS SHARDS JOINT LEAVE_OUT CONTROLS CONTROL
    for name in FEATURES TRAIN GENERATE EVALUATE REPORT; do
        export "${name}_FLAGS" # the jobs read them from the environment
    done
}

# ---------------------------------------------------------------- checks, before anything is queued

check_settings() {
    local subject name
    local folder="$DATA/Preprocessed_data_250Hz"
    for name in SHARDS AT_ONCE; do
        [[ -z ${!name:-} || ${!name} =~ ^[1-9][0-9]*$ ]] ||
            refuse "--${name,,} ${!name}: expected a whole number >= 1" "e.g. --${name,,} 8"
    done
    [[ -z $JOINT || -z $LEAVE_OUT ]] ||
        refuse "--joint and --leave_out" "choose one: a model of all, or one without each"
    for name in SDXL IP_ADAPTER; do
        [[ -e ${!name} ]] || refuse "--${name,,} ${!name}: no such file" "check the path"
    done
    ((${#SUBJECT_NAMES[@]})) || refuse "--data $DATA: no Preprocessed_data_250Hz/sub-*" "check the path"
    for subject in "${SUBJECT_NAMES[@]}"; do
        [[ -d $folder/$subject ]] || refuse "--subjects $subject: no folder $folder/$subject" "check the name"
    done
    [[ -z $VENV || -x $VENV/bin/python ]] || refuse "--venv $VENV: no bin/python in it" "check the path"
    [[ -n $VENV ]] || command -v python >/dev/null ||
        refuse "there is no python here" "name an environment with --venv"
    [[ -n $DRY_RUN ]] || command -v sbatch >/dev/null ||
        refuse "there is no sbatch here" "run on a login node, or look at --dry_run"
}

# Pictures of i/8 are journaled as such: with other shards they would all be drawn once more.
check_shards() {
    local run journal expected="images-*-of-$SHARDS.jsonl"
    if ((SHARDS == 1)); then expected="images.jsonl"; fi
    for run in images "${CONTROL_NAMES[@]}"; do
        for journal in "$OUT/$run"/*/images*.jsonl; do
            [[ -e $journal ]] || continue # where nothing matches, the pattern itself stands here
            # shellcheck disable=SC2053 # the right side is meant as a pattern
            [[ $(basename "$journal") == $expected ]] ||
                refuse "--shards $SHARDS, but there is $journal" \
                    "go on with the same number of shards, or name another --out"
        done
    done
}

# Two jobs that write to one run directory would spoil it.
check_nothing_queued() {
    local id running
    [[ -z $DRY_RUN && -e $OUT/slurm/jobs.txt ]] || return 0
    running=$(squeue --noheader --user="$(id -un)" --format=%F)
    while read -r id _; do
        [[ $'\n'$running$'\n' != *$'\n'$id$'\n'* ]] ||
            refuse "job $id of an earlier call for $OUT is still queued or running" \
                "wait for it, or scancel what $OUT/slurm/jobs.txt lists"
    done <"$OUT/slurm/jobs.txt"
}

# check_flags: the stage refuses COMMAND's wrong flags here as it would in its job
check_flags() {
    python "${COMMAND[@]}" --print_config >/dev/null || refuse "${COMMAND[0]} refuses its flags, see above" \
        "mend the flag, or the setting *_FLAGS it came from"
}

check_stages() {
    SUBJECT=${SUBJECT_NAMES[0]} SHARD=1
    train_command
    check_flags
    for CONTROL in "" "${CONTROL_NAMES[@]}"; do
        generate_command
        check_flags
    done
    CONTROL=""
    evaluate_command
    check_flags
    report_command
    check_flags
    features_command
    check_flags
    # Its inputs are all there already. This node may lack the GPU that the job will have.
    python "${COMMAND[@]}" --dry_run --device cpu ||
        refuse "${COMMAND[0]} cannot run, see above" "do what it says"
}

# ---------------------------------------------------------------- submitting

# submit NAME SCRIPT WHAT SBATCH_OPTION... -> JOB, and a line of the table
submit() {
    local name=$1 script=$2 what=$3 answer
    local options=(--parsable --export=ALL --kill-on-invalid-dep=yes --job-name="$name")
    shift 3
    split_flags_of_stage "$script"
    options+=("${SITE[@]}" "$@" "${FLAGS[@]}" "${EXTRA[@]}")
    if [[ -n $DRY_RUN ]]; then
        JOB="<$name>"
        printf '%q ' sbatch "${options[@]}" "slurm/$script.sbatch"
        printf '\n'
    else
        answer=$(sbatch "${options[@]}" "slurm/$script.sbatch") || withdraw "$name"
        JOB=${answer%%;*} # "id" or "id;cluster"
        echo "$JOB $name" >>"$OUT/slurm/jobs.txt"
    fi
    JOBS+=("$JOB")
    TABLE+=("$(printf '%-12s %-24s %s' "$JOB" "$name" "$what")")
}

split_flags_of_stage() {
    local name="${1^^}_SBATCH"
    split_flags "${!name:-}"
}

# Half a pipeline helps nobody: take back what is queued already.
withdraw() {
    if ((${#JOBS[@]})); then scancel "${JOBS[@]}"; fi
    printf 'pipeline.sh: error: sbatch refused %s, see above\n  cure: mend it and run this again\n' "$1" >&2
    printf 'Nothing is queued: %s cancelled.\n' "${JOBS[*]:-nothing was submitted, none}" >&2
    exit 1
}

submit_all() {
    local people=${#SUBJECT_NAMES[@]} models=${#SUBJECT_NAMES[@]} limit="${AT_ONCE:+%$AT_ONCE}"
    local logs="${OUT//%/%%}/slurm" # sbatch reads % in file names as its own
    local log="$logs/%x-%j.out" array_log="$logs/%x-%A_%a.out" gpu=(--gres="$GRES")
    local pictures names control after_train after_pictures
    JOBS=() TABLE=() SITE=()
    if [[ -n ${PARTITION:-} ]]; then SITE+=(--partition="$PARTITION"); fi
    if [[ -n ${ACCOUNT:-} ]]; then SITE+=(--account="$ACCOUNT"); fi
    if [[ -n $JOINT ]]; then models=1; fi
    names="${SUBJECT_NAMES[*]}"

    submit features features "embeddings of all stimuli" --output="$log" "${gpu[@]}"
    submit train train "$models model(s) of $names" --output="$array_log" "${gpu[@]}" \
        --array="1-$models$limit" --dependency="afterok:$JOB"

    # Task i may follow task i of another array (aftercorr) where both mean the i-th subject: then one
    # subject's failure does not hold up the others. With shards, task numbers mean different things.
    after_train="afterok:$JOB"
    if ((SHARDS == 1)) && [[ -z $JOINT ]]; then after_train="aftercorr:$JOB"; fi
    pictures="1-$((people * SHARDS))$limit"
    submit generate generate "pictures, $people subject(s) x $SHARDS shard(s)" --output="$array_log" \
        "${gpu[@]}" --array="$pictures" --dependency="$after_train"
    after_pictures=$JOB
    for control in "${CONTROL_NAMES[@]}"; do
        CONTROL=$control # exported: the job draws this instead
        submit "generate-$control" generate "the same for the control $control" --output="$array_log" \
            "${gpu[@]}" --array="$pictures" --dependency="$after_train"
        after_pictures+=":$JOB"
    done
    CONTROL=""

    if ((SHARDS == 1)); then
        after_pictures="aftercorr:$after_pictures"
    else
        after_pictures="afterok:$after_pictures"
    fi
    submit evaluate evaluate "scores of $names" --output="$array_log" "${gpu[@]}" \
        --array="1-$people$limit" --dependency="$after_pictures"
    submit report report "$OUT/report.html" --output="$log" --dependency="afterok:$JOB"
}

main() {
    if (($#)) && [[ $1 != -* ]]; then
        read_settings_file "$1"
        shift
    fi
    read_flags "$@"
    settle
    check_settings
    check_shards
    check_nothing_queued
    cd "$REPO" # the stages run here, and so do the jobs that are submitted from here
    prepare_environment
    check_stages
    if [[ -z $DRY_RUN ]]; then
        mkdir -p "$OUT/slurm" # SLURM does not make the folder of its logs
        : >"$OUT/slurm/jobs.txt"
    fi
    submit_all
    printf '\n%-12s %-24s %s\n' job name "what it does"
    printf '%s\n' "${TABLE[@]}"
    if [[ -n $DRY_RUN ]]; then
        printf '\ndry run: all checks passed, nothing was submitted\n'
    else
        printf '\nwatch: squeue --user=%s; logs: %s\n' "$(id -un)" "$OUT/slurm"
        printf 'If a job fails, those after it never start: mend it and run the same command again.\n'
    fi
}

main "$@"

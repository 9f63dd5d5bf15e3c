# shellcheck shell=bash
# SUBJECTS and SHARDS are settings, SUBJECT and SHARD one task's part of them:
# shellcheck disable=SC2153
# Shared by pipeline.sh (login node) and the *.sbatch scripts (compute nodes): what each stage is
# called with, and how a job that is stopped comes back. Sourced, never run.
#
# How an interrupted job comes back, without losing what it has done:
#   time limit near, preemption with a grace time   SLURM sends SIGUSR1 (--signal) or SIGTERM to this
#       shell, which passes it on. train.py saves and ends with code 75. generate.py and the others
#       simply die: every picture is on disk and in the journal as soon as it is drawn. In both cases
#       the job asks to be requeued, and the same command goes on.
#   preemption without warning, node failure        SLURM requeues the job itself (--requeue).
#   scancel, out of memory, an error                not requeued. Jobs that depend on it never start;
#       run pipeline.sh again with the same settings: finished parts are left alone, the rest goes on.

set -euo pipefail

LAUNCH=(python)  # what a stage is started with
PREEMPTED=75     # util.PREEMPTED: saved, the same command goes on
MAX_RESTARTS=100 # so that a job whose time limit is too short to get anywhere ends some day

# ---------------------------------------------------------------- which part of the work

# subject_and_shard TASK SHARDS SUBJECT... -> SUBJECT, SHARD (both 1-based in the order of the names)
# Tasks 1..SHARDS are the shards of the first subject, the next SHARDS those of the second, ...
subject_and_shard() {
    local task=$1 shards=$2
    shift 2
    if ((task < 1 || task > shards * $#)); then
        echo "array task $task is outside 1-$((shards * $#)): $# subjects x $shards shards" >&2
        return 2
    fi
    local names=("$@")
    SUBJECT=${names[(task - 1) / shards]}
    SHARD=$(((task - 1) % shards + 1))
}

# part_of_task SHARDS -> SUBJECT, SHARD of this array task
part_of_task() {
    local names
    read -r -a names <<<"$SUBJECTS"
    subject_and_shard "${SLURM_ARRAY_TASK_ID:-1}" "$1" "${names[@]}"
}

# ---------------------------------------------------------------- what each stage is called with

# needs NAME...: these environment variables must be set
needs() {
    local name
    for name in "$@"; do
        if [[ -z ${!name:-} ]]; then
            echo "$name is not set: see slurm/pipeline.sh --help" >&2
            return 2
        fi
    done
}

# split_flags TEXT -> FLAGS, one word per element; quotes in TEXT keep words together
split_flags() {
    local lines
    FLAGS=()
    if [[ -n ${1//[[:space:]]/} ]]; then
        lines=$(xargs printf '%s\n' <<<"$1") || {
            echo "cannot split into words: $1" >&2
            return 2
        }
        mapfile -t FLAGS <<<"$lines"
    fi
}

# One model per subject; with JOINT one for all of them; with LEAVE_OUT the one without this subject.
model_of() {
    if [[ -n ${JOINT:-} ]]; then
        echo "$OUT/model"
    elif [[ -n ${LEAVE_OUT:-} ]]; then
        echo "$OUT/model/without_$1"
    else
        echo "$OUT/model/$1"
    fi
}

# The functions below fill COMMAND. pipeline.sh checks the same commands before it queues anything.
# The user's flags come last: of a flag that is given twice, the last counts.

# of SUBJECT
preprocess_command() {
    needs DATA SUBJECTS
    split_flags "${PREPROCESS_FLAGS:-}"
    COMMAND=(preprocess.py --data_path "$DATA" --subjects "$SUBJECT"
        --n_jobs "${SLURM_CPUS_PER_TASK:-1}" "${FLAGS[@]}")
}

# Tasks of an array, 1-N, share the stimuli; the last one joins what they encoded.
features_command() {
    needs DATA OUT
    split_flags "${FEATURES_FLAGS:-}"
    COMMAND=(clip_feature_extractor.py --data_path "$DATA" --output_path "$OUT/clip_features"
        --num_workers "${SLURM_CPUS_PER_TASK:-1}"
        --shard "${SLURM_ARRAY_TASK_ID:-1}/${SLURM_ARRAY_TASK_COUNT:-1}" "${FLAGS[@]}")
}

# of SUBJECT; with JOINT of all SUBJECTS; with LEAVE_OUT of all but SUBJECT
train_command() {
    needs DATA OUT SUBJECTS
    local subjects=("$SUBJECT") left_out=()
    if [[ -n ${JOINT:-}${LEAVE_OUT:-} ]]; then
        read -r -a subjects <<<"$SUBJECTS"
    fi
    if [[ -n ${LEAVE_OUT:-} ]]; then
        left_out=(--leave_out "$SUBJECT")
    fi
    split_flags "${TRAIN_FLAGS:-}"
    COMMAND=(train.py --data_path "$DATA" --clip_feature_path "$OUT/clip_features"
        --output_dir "$(model_of "$SUBJECT")" --subjects "${subjects[@]}" "${left_out[@]}"
        "${FLAGS[@]}")
}

# launch_on_all_gpus -> LAUNCH: one process for each GPU of each node of this job. Together they
# compute one batch, so their number has to divide --batch_size.
launch_on_all_gpus() {
    local gpus=${SLURM_GPUS_ON_NODE:-1} nodes=${SLURM_NNODES:-1} hosts head
    LAUNCH=(python)
    if ((gpus * nodes == 1)); then
        return
    fi
    LAUNCH=(python -m accelerate.commands.launch)
    if ((nodes > 1)); then # a launcher on each node; only there it is known which one it is
        # not `| head`: scontrol might write on to a closed pipe, and with it this job would end
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        head=${hosts%%$'\n'*}
        # shellcheck disable=SC2016 # the node expands it
        LAUNCH=(srun --ntasks="$nodes" --ntasks-per-node=1
            bash -c 'exec "${@:2:3}" --machine_rank "$SLURM_NODEID" --main_process_ip "$1" "${@:5}"'
            launcher "$head" "${LAUNCH[@]}")
    fi
    LAUNCH+=(--multi_gpu --num_machines "$nodes" --num_processes "$((gpus * nodes))"
        --mixed_precision no --dynamo_backend no
        --main_process_port "$((20000 + ${SLURM_JOB_ID:-$$} % 20000))")
}

# of SHARD of SUBJECT; CONTROL: empty, or what is drawn instead of the decoded EEG
generate_command() {
    needs DATA OUT SUBJECTS SHARDS SDXL IP_ADAPTER
    split_flags "${GENERATE_FLAGS:-}"
    COMMAND=(generate.py --eeg_data "$DATA/Preprocessed_data_250Hz/$SUBJECT" --data_path "$DATA"
        --model_path "$(model_of "$SUBJECT")" --clip_feature_path "$OUT/clip_features"
        --sd_model_path "$SDXL" --ip_adapter_path "$IP_ADAPTER"
        --output_dir "$OUT/${CONTROL:-images}/$SUBJECT" --shard "$SHARD/$SHARDS")
    if [[ " ${FLAGS[*]} " != *" --sweep "* ]]; then # which draws a grid of its own
        COMMAND+=(--mode all)
    fi
    COMMAND+=("${FLAGS[@]}")
    if [[ -n ${CONTROL:-} ]]; then
        COMMAND+=(--mode fused --control "$CONTROL") # a control needs one picture per stimulus
    fi
}

# of SUBJECT; CONTROLS: names of the controls that were drawn, or empty
evaluate_command() {
    needs DATA OUT SUBJECTS
    local control controls beside=()
    read -r -a controls <<<"${CONTROLS:-}"
    for control in "${controls[@]}"; do
        beside+=("$OUT/$control/$SUBJECT")
    done
    split_flags "${EVALUATE_FLAGS:-}"
    COMMAND=(evaluate.py --model_path "$(model_of "$SUBJECT")" --data_path "$DATA"
        --clip_feature_path "$OUT/clip_features" --subjects "$SUBJECT"
        --images "$OUT/images/$SUBJECT" --output_dir "$OUT/scores/$SUBJECT")
    if ((${#beside[@]})); then
        COMMAND+=(--control_images "${beside[@]}")
    fi
    COMMAND+=("${FLAGS[@]}")
}

report_command() {
    needs DATA OUT SUBJECTS
    local subject control subjects controls runs=()
    read -r -a subjects <<<"$SUBJECTS"
    read -r -a controls <<<"${CONTROLS:-}"
    for subject in "${subjects[@]}"; do
        runs+=("$(model_of "$subject")" "$OUT/images/$subject") # the same run named twice counts once
        for control in "${controls[@]}"; do
            runs+=("$OUT/$control/$subject")
        done
        runs+=("$OUT/scores/$subject")
    done
    split_flags "${REPORT_FLAGS:-}"
    COMMAND=(report.py --runs "${runs[@]}" --data_path "$DATA" --output "$OUT/report.html" "${FLAGS[@]}")
}

# ---------------------------------------------------------------- running a stage as a job

prepare_environment() {
    if [[ -n ${VENV:-} ]]; then
        export PATH="$VENV/bin:$PATH" # all that activating a venv or conda environment means to python
    fi
    export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # compute nodes have no internet; asking takes minutes
    export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-${OMP_NUM_THREADS:-1}}"
    export MKL_NUM_THREADS="$OMP_NUM_THREADS"
    export PYTHONUNBUFFERED=1                            # a killed job's log is complete
    export TQDM_MININTERVAL="${TQDM_MININTERVAL:-30}"    # progress bars are read in a file here
}

pass_on() {
    STOPPED_BY=$1
    echo "SIG$1 received, passed on to the stage" >&2
    local signal=$1
    if ((${#LAUNCH[@]} > 1)); then
        signal=TERM # launchers pass this one on, and die of others
    fi
    if [[ -n $STAGE_PID ]]; then
        kill -s "$signal" "$STAGE_PID" 2>/dev/null || true # it may just have ended
    fi
}

# requeue: put this job, or this task of an array, back into the queue
requeue() {
    # Of an array, the bare id of one task can mean the whole array.
    local state job="${SLURM_JOB_ID:-}"
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    fi
    if [[ -z $job ]]; then
        echo "stopped outside SLURM: the same command goes on" >&2
        return
    fi
    if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
        echo "job $job was restarted $MAX_RESTARTS times, no more: is its --time long enough?" >&2
        return
    fi
    # After scancel, or when SLURM itself requeues it, the job is no longer RUNNING: leave it alone.
    state=$(squeue --noheader --jobs="$job" --format=%T || true)
    if [[ $state != RUNNING ]]; then
        echo "job $job is ${state:-gone}: not requeued" >&2
        return
    fi
    echo "job $job is requeued and goes on later" >&2
    scontrol requeue "$job"
}

# run_stage SCRIPT FLAG...: run it, and end this job as the head of this file says
run_stage() {
    local code
    prepare_environment
    echo "$(date '+%F %T') $(uname -n): python $(printf '%q ' "$@")"
    STOPPED_BY=""
    STAGE_PID=""
    trap 'pass_on USR1' USR1
    trap 'pass_on TERM' TERM
    # In the background: while a program runs in the foreground, bash answers no signal.
    "${LAUNCH[@]}" "$@" &
    STAGE_PID=$!
    if [[ -n $STOPPED_BY ]]; then # the signal came before there was a stage to pass it on to
        pass_on "$STOPPED_BY"
    fi
    while true; do # a signal ends the wait, but not the stage: wait again
        code=0
        wait "$STAGE_PID" || code=$?
        kill -0 "$STAGE_PID" 2>/dev/null || break
    done
    trap '' USR1 TERM # from here on nothing may interrupt the requeue
    # A launcher ends with a code of its own, whatever its processes end with.
    if ((code == PREEMPTED)) ||
        { [[ -n $STOPPED_BY ]] && ((code > 128 || (code > 0 && ${#LAUNCH[@]} > 1))); }; then
        requeue
        code=$PREEMPTED
    fi
    echo "$(date '+%F %T') ended with code $code"
    exit "$code"
}

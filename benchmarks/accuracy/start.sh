# Start every process of the final measurement in the background; each waits for its model's pieces under /tmp/pieces.
mkdir -p /tmp/pp /tmp/out
rm -rf /tmp/src && cp -r "$PWD" /tmp/src && ln -sfn /tmp/src/passes /tmp/pp/kvarn_passes
python3 -m zipfile -e /tmp/pieces/gguf*.whl /tmp/pp
export PYTHONPATH=/tmp/src:/tmp/pp OMP_NUM_THREADS=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
cd /tmp/src/benchmarks/accuracy
go() { setsid nohup python3 run_device.py /tmp/pieces /tmp/out "$@" >"/tmp/log_$1_$2_${*: -1}" 2>&1 </dev/null & }
for part in 0 1; do
    for model in smollm2-135m gemma-3-270m qwen2.5-coder-0.5b; do go $model $part 2 --kind main; done
done
go smollm2-135m 0 1 --kind long
for model in smollm2-135m gemma-3-270m qwen2.5-coder-0.5b; do go $model 0 1 --kind greedy; done
for part in 0 1 2; do go qwen2.5-coder-1.5b $part 3 --kind main; done
go qwen2.5-coder-1.5b 0 1 --kind balance
sleep 1

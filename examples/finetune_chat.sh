#!/usr/bin/env bash
# Fine-tune a chat model on your own file, convert the result, and ask the new model a question.
#
#   hf download internlm/internlm2-chat-1_8b --local-dir internlm2-chat-1_8b
#   examples/finetune_chat.sh internlm2-chat-1_8b chats.jsonl runs/mine [more flags of train.main]
#
# chats.jsonl has one object per line, for example
#   {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
set -euo pipefail

weights=$1 # directory of Hugging Face weights with their tokenizer
data=$2    # file to train on
out=$3     # directory of the run; the new model is written to $out/hf
shift 3

# Show the first packed row and a report of dropped and truncated rows.
python -m train.preview --data "$data" --tokenizer "$weights" --seq_len=2048

# Train all parameters, three epochs with XTuner's hyperparameters.
python -m train.main --recipe=internlm2-1.8b-full-alpaca-2k --model "$weights" --data "$data" --out "$out" "$@"

# Write the latest checkpoint as Hugging Face files, with the tokenizer and the model code.
python -m models.convert "$out" "$out/hf" --assets_from "$weights" --dtype=bfloat16

# Ask the new model.
python -m models.generate "$out/hf" --chat --prompt "Who are you?" --max_new_tokens=64

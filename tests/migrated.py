"""Configurations of other trainers as people write them, and what each is here, found by hand from their documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    tool: str
    name: str
    text: str
    here: str


CASES = [
    Case(
        "trl",
        "everything left out",
        "{model_name_or_path: Qwen/Qwen2-VL-2B-Instruct, dataset_name: trl-lib/rlaif-v, output_dir: out}",
        """
rounds: 1
policy: Qwen/Qwen2-VL-2B-Instruct
pairs_file: data/pairs.jsonl
run_root: out
model: {dtype: float32}
dpo: {learning_rate: 1.0e-6, num_train_epochs: 3, lr_scheduler_type: linear, warmup_steps: 0,
  per_device_train_batch_size: 8, gradient_accumulation_steps: 1, max_length: 1024}
""",
    ),
    Case(
        "trl",
        "a command with QLoRA, keeping the best state",
        """
trl dpo \\
    --model_name_or_path HuggingFaceTB/SmolVLM-Instruct --dataset_name HuggingFaceH4/rlaif-v_formatted \\
    --dataset_train_split train --output_dir out --load_in_4bit true --bnb_4bit_quant_type nf4 --use_peft true \\
    --lora_target_modules q_proj v_proj --use_dora true --lora_task_type CAUSAL_LM --learning_rate 5e-7 \\
    --remove_unused_columns false --precompute_ref_log_probs true --eval_strategy steps --eval_steps 50 \\
    --load_best_model_at_end true --metric_for_best_model eval_rewards/accuracies --greater_is_better true \\
    --max_prompt_length 512 --max_length 1536 --save_only_model true --report_to wandb \\
    --accelerate_config zero2 --num_processes 8 --max_steps 200 --logging_steps 1
""",
        """
rounds: 1
policy: HuggingFaceTB/SmolVLM-Instruct
pairs_file: data/pairs.jsonl
run_root: out
model: {dtype: float32}
dpo:
  lora: {quantize: nf4, target_modules: [q_proj, v_proj], use_dora: true, r: 16, lora_alpha: 32, lora_dropout: 0.05}
  learning_rate: 5.0e-7
  eval_steps: 50
  keep: best
  keep_metric: accuracy
  max_length: 1536
  report_to: wandb
  max_steps: 200
  logging_steps: 1
  num_train_epochs: 3
  lr_scheduler_type: linear
  warmup_steps: 0
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 1
launch: {strategy: zero2, num_processes: 8}
""",
    ),
    Case(
        "trl",
        "several losses (MPO), of an earlier version",
        """
# InternVL's mixture
model_name_or_path: OpenGVLab/InternVL3-8B-hf
torch_dtype: bfloat16
dataset_name: OpenGVLab/MMPR-v1.2
dataset_config: default
loss_type: [sigmoid, bco_pair, sft]
loss_weights: [0.8, 0.2, 1.0]
learning_rate: "5e-7"
per_device_train_batch_size: 2
gradient_accumulation_steps: 16
num_train_epochs: 1
warmup_ratio: 0.05
lr_scheduler_type: cosine
weight_decay: 0.05
max_length: null
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
dataset_num_proc: 32
output_dir: mpo
push_to_hub: true
hub_model_id: me/mpo
""",
        """
rounds: 1
policy: OpenGVLab/InternVL3-8B-hf
pairs_file: data/pairs.jsonl
run_root: mpo
model: {dtype: bfloat16}
dpo:
  loss_type: [sigmoid, bco_pair, sft]
  loss_weights: [0.8, 0.2, 1.0]
  learning_rate: 5.0e-7
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 16
  num_train_epochs: 1
  warmup_steps: 0.05
  lr_scheduler_type: cosine
  weight_decay: 0.05
  max_length: null
  gradient_checkpointing: true
  gradient_checkpointing_kwargs: {use_reentrant: false}
hub: {repo: me/mpo}
""",
    ),
    Case(
        "trl",
        "an adapter with the SFT loss by its former name",
        """
{model_name_or_path: llava-hf/llava-1.5-7b-hf, dataset_name: me/pairs, use_peft: true, rpo_alpha: 0.3, beta: 0.2,
 lora_modules_to_save: [lm_head], use_rslora: true, trust_remote_code: true, attn_implementation: flash_attention_2,
 dtype: bfloat16, label_smoothing: 0.0, truncation_mode: keep_end, output_dir: out, seed: 7}
""",
        """
rounds: 1
policy: llava-hf/llava-1.5-7b-hf
pairs_file: data/pairs.jsonl
run_root: out
model: {dtype: bfloat16, attention: flash_attention_2}
dpo:
  loss_type: [sigmoid, sft]
  loss_weights: [1.0, 0.3]
  beta: 0.2
  lora: {modules_to_save: [lm_head], use_rslora: true, r: 16, lora_alpha: 32, lora_dropout: 0.05}
  label_smoothing: 0.0
  seed: 7
  learning_rate: 1.0e-6
  num_train_epochs: 3
  lr_scheduler_type: linear
  warmup_steps: 0
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 1
  max_length: 1024
""",
    ),
    Case(
        "trl",
        "a command with flags and equals signs, of an earlier version",
        """
accelerate launch examples/scripts/dpo_vlm.py \\
    --dataset_name HuggingFaceH4/rlaif-v_formatted --dataset_streaming --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \\
    --per_device_train_batch_size=2 --gradient_accumulation_steps=32 --dataset_num_proc=32 --output_dir=rlaif-v \\
    --bf16 --torch_dtype=bfloat16 --gradient_checkpointing --use_peft --lora_target_modules=all-linear \\
    --rpo_alpha=0.0 --report_to=wandb
""",
        """
rounds: 1
policy: Qwen/Qwen2.5-VL-3B-Instruct
pairs_file: data/pairs.jsonl
run_root: rlaif-v
model: {dtype: bfloat16}
dpo:
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 32
  bf16: true
  gradient_checkpointing: true
  lora: {target_modules: all-linear, r: 16, lora_alpha: 32, lora_dropout: 0.05}
  report_to: wandb
  learning_rate: 1.0e-6
  num_train_epochs: 3
  lr_scheduler_type: linear
  warmup_steps: 0
  max_length: 1024
""",
    ),
    Case(
        "llama-factory",
        "everything left out",
        "{model_name_or_path: p, stage: dpo, do_train: true, dataset: rlhf_v, template: llava, output_dir: saves}",
        """
rounds: 1
policy: p
pairs_file: data/pairs.jsonl
run_root: saves
model: {processor: {max_pixels: 589824}}
dpo: {learning_rate: 5.0e-5, num_train_epochs: 3, lr_scheduler_type: linear, warmup_steps: 0,
  per_device_train_batch_size: 8, gradient_accumulation_steps: 1, max_length: 2048, freeze: [vision, projector],
  lora: {lora_alpha: 16, target_modules: all-linear}}
""",
    ),
    Case(
        "llama-factory",
        "full weights, the projector trained, evaluated",
        """
### model
model_name_or_path: Qwen/Qwen2-VL-7B-Instruct
image_max_pixels: 1003520
image_min_pixels: 3136
flash_attn: fa2

### method
stage: dpo
do_train: true
finetuning_type: full
freeze_vision_tower: true  # as it is by default
freeze_multi_modal_projector: false
freeze_language_model: false
pref_beta: 0.05
pref_loss: ipo
deepspeed: examples/deepspeed/ds_z2_config.json

dataset: rlhf_v,dpo_zh_demo
dataset_dir: data
media_dir: data
template: qwen2_vl
cutoff_len: 8192
val_size: 0.05
eval_strategy: steps
eval_steps: 500
per_device_eval_batch_size: 1
output_dir: saves/full
bf16: true
pure_bf16: true
disable_gradient_checkpointing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 1.0e-6
num_train_epochs: 1.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
""",
        """
rounds: 1
policy: Qwen/Qwen2-VL-7B-Instruct
pairs_file: data/pairs.jsonl
image_root: data
run_root: saves/full
model: {dtype: bfloat16, attention: flash_attention_2, processor: {max_pixels: 1003520, min_pixels: 3136}}
dpo:
  freeze: [vision]
  beta: 0.05
  loss_type: [ipo]
  max_length: 8192
  held_out: 0.05
  eval_steps: 500
  bf16: true
  gradient_checkpointing: false
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 4
  learning_rate: 1.0e-6
  num_train_epochs: 1.0
  lr_scheduler_type: cosine
  warmup_steps: 0.1
launch: {strategy: zero2}
""",
    ),
    Case(
        "llama-factory",
        "modules by name, the SFT loss, four bits, every part adapted",
        """
{model_name_or_path: p, stage: dpo, do_train: true, finetuning_type: lora, lora_rank: 64, lora_alpha: 64,
 lora_dropout: 0.1, lora_target: "q_proj, v_proj", additional_target: embed_tokens, quantization_bit: 4,
 quantization_method: bnb, double_quantization: true, freeze_vision_tower: false, freeze_multi_modal_projector: false,
 pref_beta: 0.1, pref_ftx: 0.1, dataset: mine, template: qwen2_vl, cutoff_len: 1024, output_dir: saves, fp16: true,
 learning_rate: 5.0e-6, num_train_epochs: 3.0, per_device_train_batch_size: 1, gradient_accumulation_steps: 8,
 image_max_pixels: 262144, optim: adamw_torch, max_grad_norm: 0.5, report_to: wandb, run_name: mine}
""",
        """
rounds: 1
policy: p
pairs_file: data/pairs.jsonl
run_root: saves
model: {processor: {max_pixels: 262144}}
dpo:
  lora: {r: 64, lora_alpha: 64, lora_dropout: 0.1, target_modules: [q_proj, v_proj], modules_to_save: [embed_tokens],
    quantize: nf4}
  beta: 0.1
  loss_type: [sigmoid, sft]
  loss_weights: [1.0, 0.1]
  max_length: 1024
  fp16: true
  learning_rate: 5.0e-6
  num_train_epochs: 3.0
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 8
  optim: adamw_torch
  max_grad_norm: 0.5
  report_to: wandb
  run_name: mine
  lr_scheduler_type: linear
  warmup_steps: 0
""",
    ),
    Case(
        "llama-factory",
        "a command with variables before it",
        """
FORCE_TORCHRUN=1 NPROC_PER_NODE=4 CUDA_VISIBLE_DEVICES=0,1,2,3 \\
llamafactory-cli train \\
    --stage dpo --do_train true --model_name_or_path p --dataset mine --template qwen2_vl --finetuning_type lora \\
    --lora_target all --pref_beta 0.1 --pref_loss sigmoid --output_dir saves --max_steps 300 \\
    --learning_rate 5e-6 --lr_scheduler_type constant_with_warmup --warmup_steps 20 --image_max_pixels 262144 \\
    --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --cutoff_len 4096 --bf16 true
""",
        """
rounds: 1
policy: p
pairs_file: data/pairs.jsonl
run_root: saves
model: {dtype: bfloat16, processor: {max_pixels: 262144}}
dpo:
  lora: {target_modules: all-linear, lora_alpha: 16}
  freeze: [vision, projector]
  beta: 0.1
  loss_type: [sigmoid]
  max_steps: 300
  learning_rate: 5.0e-6
  lr_scheduler_type: constant_with_warmup
  warmup_steps: 20
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 4
  max_length: 4096
  bf16: true
  num_train_epochs: 3
launch: {num_processes: 4}
""",
    ),
    Case(
        "ms-swift",
        "everything left out, on two processes",
        """
NPROC_PER_NODE=2 swift rlhf \\
    --rlhf_type dpo --model p --dataset pairs.jsonl --output_dir output
""",
        """
rounds: 1
policy: p
pairs_file: data/pairs.jsonl
run_root: output
dpo: {learning_rate: 1.0e-4, num_train_epochs: 3, warmup_steps: 0, weight_decay: 0.1, adam_beta2: 0.95,
  on_too_long: drop, freeze: [vision, projector],
  lora: {lora_alpha: 32, lora_dropout: 0.05, target_modules: all-linear}}
launch: {num_processes: 2}
""",
    ),
    Case(
        "ms-swift",
        "full weights on four GPUs (version 3)",
        """
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' CUDA_VISIBLE_DEVICES=0,1,2,3 NPROC_PER_NODE=4 MAX_PIXELS=1003520 \\
swift rlhf \\
    --rlhf_type dpo --model Qwen/Qwen2.5-VL-7B-Instruct --dataset 'swift/RLAIF-V-Dataset#20000' --train_type full \\
    --torch_dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 \\
    --freeze_vit true --freeze_aligner false --gradient_accumulation_steps 4 --save_steps 100 --save_total_limit 2 \\
    --deepspeed zero3 --logging_steps 5 --max_length 4096 --output_dir output --warmup_ratio 0.05 \\
    --dataloader_num_workers 4 --dataset_num_proc 4 --save_only_model true --attn_impl flash_attn
""",
        """
rounds: 1
policy: Qwen/Qwen2.5-VL-7B-Instruct
pairs_file: data/pairs.jsonl
run_root: output
model: {dtype: bfloat16, attention: flash_attention_2, processor: {max_pixels: 1003520}}
dpo:
  num_train_epochs: 1
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 4
  save_steps: 100
  save_total_limit: 2
  logging_steps: 5
  max_length: 4096
  warmup_steps: 0.05
  dataloader_num_workers: 4
  learning_rate: 1.0e-5
  weight_decay: 0.1
  adam_beta2: 0.95
  on_too_long: drop
  freeze: [vision]
launch: {num_processes: 4, strategy: zero3}
""",
    ),
    Case(
        "ms-swift",
        "a file with two losses and a pattern for adapters",
        """
model: OpenGVLab/InternVL3-8B
template: internvl2_5
rlhf_type: dpo
dataset: [a.jsonl, b.jsonl]
tuner_type: lora
target_regex: ^language_model.*\\.(q_proj|v_proj)$
lora_bias: none
loss_type: [sigmoid, bco_pair]
loss_weights: [0.8, 0.2]
beta: 0.2
ld_alpha: 0.5
learning_rate: 2.0e-5
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1.0e-6}
truncation_strategy: delete
max_pixels: 802816
use_hf: true
report_to: [tensorboard, wandb]
output_dir: output
gradient_checkpointing: true
seed: 42
""",
        """
rounds: 1
policy: OpenGVLab/InternVL3-8B
pairs_file: data/pairs.jsonl
run_root: output
model: {processor: {max_pixels: 802816}}
dpo:
  lora: {target_modules: '^language_model.*\\.(q_proj|v_proj)$', bias: none, lora_alpha: 32, lora_dropout: 0.05}
  loss_type: [sigmoid, bco_pair]
  loss_weights: [0.8, 0.2]
  beta: 0.2
  ld_alpha: 0.5
  learning_rate: 2.0e-5
  lr_scheduler_type: cosine_with_min_lr
  lr_scheduler_kwargs: {min_lr: 1.0e-6}
  on_too_long: drop
  report_to: [tensorboard, wandb]
  gradient_checkpointing: true
  seed: 42
  num_train_epochs: 3
  warmup_steps: 0
  weight_decay: 0.1
  adam_beta2: 0.95
  gradient_accumulation_steps: 16
""",
    ),
    Case(
        "ms-swift",
        "four bits, modules by name, evaluated",
        """
CUDA_VISIBLE_DEVICES=0 MAX_PIXELS=602112 MIN_PIXELS=3136 swift rlhf \\
    --rlhf_type dpo --model p --dataset pairs.jsonl --tuner_type lora --quant_bits 4 --quant_method bnb \\
    --bnb_4bit_compute_dtype bfloat16 --lora_rank 16 --target_modules q_proj k_proj v_proj \\
    --lazy_tokenize true --split_dataset_ratio 0.02 --eval_strategy steps --eval_steps 0.25 \\
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --max_length 2048 --output_dir output
""",
        """
rounds: 1
policy: p
pairs_file: data/pairs.jsonl
run_root: output
model: {processor: {max_pixels: 602112, min_pixels: 3136}}
dpo:
  lora: {quantize: nf4, r: 16, target_modules: [q_proj, k_proj, v_proj], lora_alpha: 32, lora_dropout: 0.05}
  held_out: 0.02
  eval_steps: 0.25
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 8
  max_length: 2048
  learning_rate: 1.0e-4
  num_train_epochs: 3
  warmup_steps: 0
  weight_decay: 0.1
  adam_beta2: 0.95
  on_too_long: drop
""",
    ),
    Case(
        "ms-swift",
        "three losses (MPO), the best state kept, in version 3",
        """
NPROC_PER_NODE=4 MAX_PIXELS=1003520 swift rlhf \\
    --rlhf_type dpo --model Qwen/Qwen2.5-VL-7B-Instruct --ref_model Qwen/Qwen2.5-VL-7B-Instruct --train_type full \\
    --dataset a.json b.json --split_dataset_ratio 0.01 --torch_dtype bfloat16 --loss_type sigmoid bco_pair sft \\
    --loss_weights 0.8 0.2 1.0 --rpo_alpha 0.0 --num_train_epochs 1 --learning_rate 1e-5 --freeze_vit true \\
    --gradient_accumulation_steps 4 --eval_steps 100 --deepspeed zero3 --max_length 4096 --warmup_ratio 0.05 \\
    --truncation_strategy right --padding_free true --load_best_model_at_end true --output_dir output
""",
        """
rounds: 1
policy: Qwen/Qwen2.5-VL-7B-Instruct
pairs_file: data/pairs.jsonl
run_root: output
model: {dtype: bfloat16, processor: {max_pixels: 1003520}}
dpo:
  held_out: 0.01
  loss_type: [sigmoid, bco_pair, sft]
  loss_weights: [0.8, 0.2, 1.0]
  num_train_epochs: 1
  learning_rate: 1.0e-5
  gradient_accumulation_steps: 4
  eval_steps: 100
  keep: best
  max_length: 4096
  warmup_steps: 0.05
  weight_decay: 0.1
  adam_beta2: 0.95
  on_too_long: drop
  freeze: [vision, projector]
launch: {num_processes: 4, strategy: zero3}
""",
    ),
]

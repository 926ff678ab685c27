"""What `param_groups` makes of real models, line by line, and that it cuts where they do.

TABLES has a line for every parameter: its name with * for the numbers of layers, the optimizer, and all that the table
says of it. Every parameter is matched by one line and every line matches. The models are tiny, their classes real.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muon_kernels import MuonAdamW, param_groups
from muon_kernels.split import pieces

transformers = pytest.importorskip("transformers", reason="the extra `integrations` is not installed")
peft = pytest.importorskip("peft", reason="the extra `integrations` is not installed")
timm = pytest.importorskip("timm", reason="the extra `integrations` is not installed")
torchvision = pytest.importorskip("torchvision", reason="the extra `integrations` is not installed")

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**WIDTHS, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
VISION = {**WIDTHS, "image_size": 16, "patch_size": 8}


def model(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of transformers by its name, with its configuration's default but for the options."""
    cls = getattr(transformers, kind)
    return lambda: cls(cls.config_class(**options))


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **options)


def lora() -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["lm_head"])
    return peft.get_peft_model(MODELS["llama"](), config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": model(
        "GPT2LMHeadModel", n_layer=1, n_embd=16, n_head=4, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2
    ),
    "llama": model("LlamaForCausalLM", **GROUPED),
    "qwen2_moe": model("Qwen2MoeForCausalLM", **EXPERTS, shared_expert_intermediate_size=20),
    "qwen3_moe": model("Qwen3MoeForCausalLM", **EXPERTS, head_dim=4),
    "deepseek_v3": model(
        "DeepseekV3ForCausalLM",
        **{**TEXT, "num_hidden_layers": 2},
        **{"first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 12, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 12},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5},
    ),
    "mamba": model(
        "MambaForCausalLM", hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4, time_step_rank=2
    ),
    "t5": model("T5ForConditionalGeneration", d_model=16, d_kv=4, num_heads=4, d_ff=24, num_layers=1, vocab_size=64),
    "vit": model("ViTForImageClassification", **VISION),
    "convnext": model("ConvNextForImageClassification", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "whisper": model(
        "WhisperForConditionalGeneration",
        **{"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 20},
        **{"max_target_positions": 20, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        decoder_start_token_id=3,
    ),
    "clip": model(
        "CLIPModel",
        text_config={**TEXT, "max_position_embeddings": 12},
        vision_config=VISION,
        projection_dim=12,
    ),
    "gpt_oss": model("GptOssForCausalLM", **GROUPED, head_dim=4, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_next": model(
        "Qwen3NextForCausalLM",
        **{**EXPERTS, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 4},
        **{"shared_expert_intermediate_size": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 4, "linear_value_head_dim": 5},
    ),
    "modernbert": model("ModernBertForSequenceClassification", **TEXT, cls_token_id=1, sep_token_id=2),
    "perceiver": model(
        "PerceiverForMaskedLM",
        **{"num_latents": 6, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1},
        **{"num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 16, "v_channels": 16},
        **{"vocab_size": 64, "max_position_embeddings": 12},
    ),
    "opt": model(
        "OPTModel",
        **{"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"ffn_dim": 24, "vocab_size": 64, "max_position_embeddings": 14},
    ),
    "yolos": model(
        "YolosForObjectDetection",
        **{**VISION, "image_size": [16, 16]},
        num_detection_tokens=5,
        use_mid_position_embeddings=False,
    ),
    "sam": model(
        "SamModel",
        vision_config={
            **WIDTHS,
            "mlp_dim": 24,
            "image_size": 32,
            "patch_size": 8,
            "output_channels": 16,
            "window_size": 2,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={**WIDTHS, "mlp_dim": 24, "iou_head_hidden_dim": 16},
    ),
    "lora": lora,
    "deit": timm_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2),
    "levit": timm_model("levit_128s", img_size=64, embed_dim=(16, 24), key_dim=4, depth=(1, 1), num_heads=(2, 3)),
    "convnext_timm": timm_model("convnext_atto", dims=(8, 16, 16, 24), depths=(1, 1, 1, 1)),
    "efficientnet": timm_model("efficientnet_b0"),
    "resnet": timm_model("resnet18", channels=(8, 16, 16, 24), layers=(1, 1, 1, 1)),
    "squeezenet": torchvision.models.squeezenet1_1,
}

# fmt: off
TABLES: dict[str, str] = {
    "gpt2": """
        transformer.wte.weight              AdamW  embedding, tied with lm_head.weight
        transformer.wpe.weight              AdamW  embedding
        transformer.h.*.ln_1.weight         AdamW  norm
        transformer.h.*.ln_1.bias           AdamW  norm
        transformer.h.*.attn.c_attn.weight  Muon   matrix in Conv1D, transposed, split: equal(3, dim=1)
        transformer.h.*.attn.c_attn.bias    AdamW  bias
        transformer.h.*.attn.c_proj.weight  Muon   matrix in Conv1D, transposed
        transformer.h.*.attn.c_proj.bias    AdamW  bias
        transformer.h.*.ln_2.weight         AdamW  norm
        transformer.h.*.ln_2.bias           AdamW  norm
        transformer.h.*.mlp.c_fc.weight     Muon   matrix in Conv1D, transposed
        transformer.h.*.mlp.c_fc.bias       AdamW  bias
        transformer.h.*.mlp.c_proj.weight   Muon   matrix in Conv1D, transposed
        transformer.h.*.mlp.c_proj.bias     AdamW  bias
        transformer.ln_f.weight             AdamW  norm
        transformer.ln_f.bias               AdamW  norm
    """,
    "llama": """
        model.embed_tokens.weight                       AdamW  embedding
        model.layers.*.self_attn.q_proj.weight          Muon   matrix in Linear
        model.layers.*.self_attn.k_proj.weight          Muon   matrix in Linear
        model.layers.*.self_attn.v_proj.weight          Muon   matrix in Linear
        model.layers.*.self_attn.o_proj.weight          Muon   matrix in Linear
        model.layers.*.mlp.gate_proj.weight             Muon   matrix in Linear
        model.layers.*.mlp.up_proj.weight               Muon   matrix in Linear
        model.layers.*.mlp.down_proj.weight             Muon   matrix in Linear
        model.layers.*.input_layernorm.weight           AdamW  norm
        model.layers.*.post_attention_layernorm.weight  AdamW  norm
        model.norm.weight                               AdamW  norm
        lm_head.weight                                  AdamW  output head
    """,
    "qwen2_moe": """
        model.embed_tokens.weight                          AdamW  embedding
        model.layers.*.self_attn.q_proj.weight             Muon   matrix in Linear
        model.layers.*.self_attn.q_proj.bias               AdamW  bias
        model.layers.*.self_attn.k_proj.weight             Muon   matrix in Linear
        model.layers.*.self_attn.k_proj.bias               AdamW  bias
        model.layers.*.self_attn.v_proj.weight             Muon   matrix in Linear
        model.layers.*.self_attn.v_proj.bias               AdamW  bias
        model.layers.*.self_attn.o_proj.weight             Muon   matrix in Linear
        model.layers.*.mlp.gate.weight                     Muon   router
        model.layers.*.mlp.experts.gate_up_proj            Muon   stack of matrices in Qwen2MoeExperts, split: equal(2)
        model.layers.*.mlp.experts.down_proj               Muon   stack of matrices in Qwen2MoeExperts
        model.layers.*.mlp.shared_expert.gate_proj.weight  Muon   matrix in Linear
        model.layers.*.mlp.shared_expert.up_proj.weight    Muon   matrix in Linear
        model.layers.*.mlp.shared_expert.down_proj.weight  Muon   matrix in Linear
        model.layers.*.mlp.shared_expert_gate.weight       AdamW  vector
        model.layers.*.input_layernorm.weight              AdamW  norm
        model.layers.*.post_attention_layernorm.weight     AdamW  norm
        model.norm.weight                                  AdamW  norm
        lm_head.weight                                     AdamW  output head
    """,
    "qwen3_moe": """
        model.embed_tokens.weight                       AdamW  embedding
        model.layers.*.self_attn.q_proj.weight          Muon   matrix in Linear
        model.layers.*.self_attn.k_proj.weight          Muon   matrix in Linear
        model.layers.*.self_attn.v_proj.weight          Muon   matrix in Linear
        model.layers.*.self_attn.o_proj.weight          Muon   matrix in Linear
        model.layers.*.self_attn.q_norm.weight          AdamW  norm
        model.layers.*.self_attn.k_norm.weight          AdamW  norm
        model.layers.*.mlp.experts.gate_up_proj         Muon   stack of matrices in Qwen3MoeExperts, split: equal(2)
        model.layers.*.mlp.experts.down_proj            Muon   stack of matrices in Qwen3MoeExperts
        model.layers.*.mlp.gate.weight                  Muon   router
        model.layers.*.input_layernorm.weight           AdamW  norm
        model.layers.*.post_attention_layernorm.weight  AdamW  norm
        model.norm.weight                               AdamW  norm
        lm_head.weight                                  AdamW  output head
    """,
    "deepseek_v3": """
        model.embed_tokens.weight                           AdamW  embedding
        model.layers.*.self_attn.q_a_proj.weight            Muon   matrix in Linear
        model.layers.*.self_attn.q_a_layernorm.weight       AdamW  norm
        model.layers.*.self_attn.q_b_proj.weight            Muon   matrix in Linear, split: blocks(6, 4, interleaved=True)
        model.layers.*.self_attn.kv_a_proj_with_mqa.weight  Muon   matrix in Linear, split: blocks(8, 4)
        model.layers.*.self_attn.kv_a_layernorm.weight      AdamW  norm
        model.layers.*.self_attn.kv_b_proj.weight           Muon   matrix in Linear, split: blocks(6, 5, interleaved=True)
        model.layers.*.self_attn.o_proj.weight              Muon   matrix in Linear
        model.layers.*.mlp.gate_proj.weight                 Muon   matrix in Linear
        model.layers.*.mlp.up_proj.weight                   Muon   matrix in Linear
        model.layers.*.mlp.down_proj.weight                 Muon   matrix in Linear
        model.layers.*.input_layernorm.weight               AdamW  norm
        model.layers.*.post_attention_layernorm.weight      AdamW  norm
        model.layers.*.mlp.experts.gate_up_proj             Muon   stack of matrices in DeepseekV3Experts, split: equal(2)
        model.layers.*.mlp.experts.down_proj                Muon   stack of matrices in DeepseekV3Experts
        model.layers.*.mlp.gate.weight                      Muon   router
        model.layers.*.mlp.shared_experts.gate_proj.weight  Muon   matrix in Linear
        model.layers.*.mlp.shared_experts.up_proj.weight    Muon   matrix in Linear
        model.layers.*.mlp.shared_experts.down_proj.weight  Muon   matrix in Linear
        model.norm.weight                                   AdamW  norm
        lm_head.weight                                      AdamW  output head
    """,  # noqa: E501
    "mamba": """
        backbone.embeddings.weight               AdamW  embedding, tied with lm_head.weight
        backbone.layers.*.norm.weight            AdamW  norm
        backbone.layers.*.mixer.A_log            AdamW  state-space table
        backbone.layers.*.mixer.D                AdamW  vector
        backbone.layers.*.mixer.conv1d.weight    AdamW  depthwise convolution
        backbone.layers.*.mixer.conv1d.bias      AdamW  bias
        backbone.layers.*.mixer.in_proj.weight   Muon   matrix in Linear, split: equal(2)
        backbone.layers.*.mixer.x_proj.weight    Muon   matrix in Linear, split: blocks(2, 4, 4)
        backbone.layers.*.mixer.dt_proj.weight   Muon   matrix in Linear
        backbone.layers.*.mixer.dt_proj.bias     AdamW  bias
        backbone.layers.*.mixer.out_proj.weight  Muon   matrix in Linear
        backbone.norm_f.weight                   AdamW  norm
    """,
    "t5": """
        shared.weight                                                         AdamW  embedding, tied with encoder.embed_tokens.weight, decoder.embed_tokens.weight, lm_head.weight
        encoder.block.*.layer.*.SelfAttention.q.weight                        Muon   matrix in Linear
        encoder.block.*.layer.*.SelfAttention.k.weight                        Muon   matrix in Linear
        encoder.block.*.layer.*.SelfAttention.v.weight                        Muon   matrix in Linear
        encoder.block.*.layer.*.SelfAttention.o.weight                        Muon   matrix in Linear
        encoder.block.*.layer.*.SelfAttention.relative_attention_bias.weight  AdamW  embedding
        encoder.block.*.layer.*.layer_norm.weight                             AdamW  norm
        encoder.block.*.layer.*.DenseReluDense.wi.weight                      Muon   matrix in Linear
        encoder.block.*.layer.*.DenseReluDense.wo.weight                      Muon   matrix in Linear
        encoder.final_layer_norm.weight                                       AdamW  norm
        decoder.block.*.layer.*.SelfAttention.q.weight                        Muon   matrix in Linear
        decoder.block.*.layer.*.SelfAttention.k.weight                        Muon   matrix in Linear
        decoder.block.*.layer.*.SelfAttention.v.weight                        Muon   matrix in Linear
        decoder.block.*.layer.*.SelfAttention.o.weight                        Muon   matrix in Linear
        decoder.block.*.layer.*.SelfAttention.relative_attention_bias.weight  AdamW  embedding
        decoder.block.*.layer.*.layer_norm.weight                             AdamW  norm
        decoder.block.*.layer.*.EncDecAttention.q.weight                      Muon   matrix in Linear
        decoder.block.*.layer.*.EncDecAttention.k.weight                      Muon   matrix in Linear
        decoder.block.*.layer.*.EncDecAttention.v.weight                      Muon   matrix in Linear
        decoder.block.*.layer.*.EncDecAttention.o.weight                      Muon   matrix in Linear
        decoder.block.*.layer.*.DenseReluDense.wi.weight                      Muon   matrix in Linear
        decoder.block.*.layer.*.DenseReluDense.wo.weight                      Muon   matrix in Linear
        decoder.final_layer_norm.weight                                       AdamW  norm
    """,  # noqa: E501
    "vit": """
        vit.embeddings.cls_token                           AdamW  vector
        vit.embeddings.position_embeddings                 AdamW  position table
        vit.embeddings.patch_embeddings.projection.weight  AdamW  stem or patch embedding
        vit.embeddings.patch_embeddings.projection.bias    AdamW  bias
        vit.layers.*.attention.q_proj.weight               Muon   matrix in Linear
        vit.layers.*.attention.q_proj.bias                 AdamW  bias
        vit.layers.*.attention.k_proj.weight               Muon   matrix in Linear
        vit.layers.*.attention.k_proj.bias                 AdamW  bias
        vit.layers.*.attention.v_proj.weight               Muon   matrix in Linear
        vit.layers.*.attention.v_proj.bias                 AdamW  bias
        vit.layers.*.attention.o_proj.weight               Muon   matrix in Linear
        vit.layers.*.attention.o_proj.bias                 AdamW  bias
        vit.layers.*.layernorm_before.weight               AdamW  norm
        vit.layers.*.layernorm_before.bias                 AdamW  norm
        vit.layers.*.layernorm_after.weight                AdamW  norm
        vit.layers.*.layernorm_after.bias                  AdamW  norm
        vit.layers.*.mlp.fc1.weight                        Muon   matrix in Linear
        vit.layers.*.mlp.fc1.bias                          AdamW  bias
        vit.layers.*.mlp.fc2.weight                        Muon   matrix in Linear
        vit.layers.*.mlp.fc2.bias                          AdamW  bias
        vit.layernorm.weight                               AdamW  norm
        vit.layernorm.bias                                 AdamW  norm
        classifier.weight                                  AdamW  output head
        classifier.bias                                    AdamW  bias
    """,
    "convnext": """
        convnext.embeddings.patch_embeddings.weight               AdamW  stem or patch embedding
        convnext.embeddings.patch_embeddings.bias                 AdamW  bias
        convnext.embeddings.layernorm.weight                      AdamW  norm
        convnext.embeddings.layernorm.bias                        AdamW  norm
        convnext.encoder.stages.*.layers.*.layer_scale_parameter  AdamW  vector
        convnext.encoder.stages.*.layers.*.dwconv.weight          AdamW  depthwise convolution
        convnext.encoder.stages.*.layers.*.dwconv.bias            AdamW  bias
        convnext.encoder.stages.*.layers.*.layernorm.weight       AdamW  norm
        convnext.encoder.stages.*.layers.*.layernorm.bias         AdamW  norm
        convnext.encoder.stages.*.layers.*.pwconv1.weight         Muon   matrix in Linear
        convnext.encoder.stages.*.layers.*.pwconv1.bias           AdamW  bias
        convnext.encoder.stages.*.layers.*.pwconv2.weight         Muon   matrix in Linear
        convnext.encoder.stages.*.layers.*.pwconv2.bias           AdamW  bias
        convnext.encoder.stages.*.downsampling_layer.0.weight     AdamW  norm
        convnext.encoder.stages.*.downsampling_layer.0.bias       AdamW  norm
        convnext.encoder.stages.*.downsampling_layer.1.weight     Muon   flattened to a matrix in Conv2d
        convnext.encoder.stages.*.downsampling_layer.1.bias       AdamW  bias
        convnext.layernorm.weight                                 AdamW  norm
        convnext.layernorm.bias                                   AdamW  norm
        classifier.weight                                         AdamW  output head
        classifier.bias                                           AdamW  bias
    """,
    "whisper": """
        model.encoder.conv1.weight                             AdamW  3-D convolution weight
        model.encoder.conv1.bias                               AdamW  bias
        model.encoder.conv2.weight                             AdamW  3-D convolution weight
        model.encoder.conv2.bias                               AdamW  bias
        model.encoder.embed_positions.weight                   none   frozen
        model.encoder.layers.*.self_attn.k_proj.weight         Muon   matrix in Linear
        model.encoder.layers.*.self_attn.v_proj.weight         Muon   matrix in Linear
        model.encoder.layers.*.self_attn.v_proj.bias           AdamW  bias
        model.encoder.layers.*.self_attn.q_proj.weight         Muon   matrix in Linear
        model.encoder.layers.*.self_attn.q_proj.bias           AdamW  bias
        model.encoder.layers.*.self_attn.out_proj.weight       Muon   matrix in Linear
        model.encoder.layers.*.self_attn.out_proj.bias         AdamW  bias
        model.encoder.layers.*.self_attn_layer_norm.weight     AdamW  norm
        model.encoder.layers.*.self_attn_layer_norm.bias       AdamW  norm
        model.encoder.layers.*.fc1.weight                      Muon   matrix in Linear
        model.encoder.layers.*.fc1.bias                        AdamW  bias
        model.encoder.layers.*.fc2.weight                      Muon   matrix in Linear
        model.encoder.layers.*.fc2.bias                        AdamW  bias
        model.encoder.layers.*.final_layer_norm.weight         AdamW  norm
        model.encoder.layers.*.final_layer_norm.bias           AdamW  norm
        model.encoder.layer_norm.weight                        AdamW  norm
        model.encoder.layer_norm.bias                          AdamW  norm
        model.decoder.embed_tokens.weight                      AdamW  embedding, tied with proj_out.weight
        model.decoder.embed_positions.weight                   AdamW  embedding
        model.decoder.layers.*.self_attn.k_proj.weight         Muon   matrix in Linear
        model.decoder.layers.*.self_attn.v_proj.weight         Muon   matrix in Linear
        model.decoder.layers.*.self_attn.v_proj.bias           AdamW  bias
        model.decoder.layers.*.self_attn.q_proj.weight         Muon   matrix in Linear
        model.decoder.layers.*.self_attn.q_proj.bias           AdamW  bias
        model.decoder.layers.*.self_attn.out_proj.weight       Muon   matrix in Linear
        model.decoder.layers.*.self_attn.out_proj.bias         AdamW  bias
        model.decoder.layers.*.self_attn_layer_norm.weight     AdamW  norm
        model.decoder.layers.*.self_attn_layer_norm.bias       AdamW  norm
        model.decoder.layers.*.encoder_attn.k_proj.weight      Muon   matrix in Linear
        model.decoder.layers.*.encoder_attn.v_proj.weight      Muon   matrix in Linear
        model.decoder.layers.*.encoder_attn.v_proj.bias        AdamW  bias
        model.decoder.layers.*.encoder_attn.q_proj.weight      Muon   matrix in Linear
        model.decoder.layers.*.encoder_attn.q_proj.bias        AdamW  bias
        model.decoder.layers.*.encoder_attn.out_proj.weight    Muon   matrix in Linear
        model.decoder.layers.*.encoder_attn.out_proj.bias      AdamW  bias
        model.decoder.layers.*.encoder_attn_layer_norm.weight  AdamW  norm
        model.decoder.layers.*.encoder_attn_layer_norm.bias    AdamW  norm
        model.decoder.layers.*.fc1.weight                      Muon   matrix in Linear
        model.decoder.layers.*.fc1.bias                        AdamW  bias
        model.decoder.layers.*.fc2.weight                      Muon   matrix in Linear
        model.decoder.layers.*.fc2.bias                        AdamW  bias
        model.decoder.layers.*.final_layer_norm.weight         AdamW  norm
        model.decoder.layers.*.final_layer_norm.bias           AdamW  norm
        model.decoder.layer_norm.weight                        AdamW  norm
        model.decoder.layer_norm.bias                          AdamW  norm
    """,
    "clip": """
        logit_scale                                              AdamW  vector
        text_model.embeddings.token_embedding.weight             AdamW  embedding
        text_model.embeddings.position_embedding.weight          AdamW  embedding
        text_model.encoder.layers.*.self_attn.k_proj.weight      Muon   matrix in Linear
        text_model.encoder.layers.*.self_attn.k_proj.bias        AdamW  bias
        text_model.encoder.layers.*.self_attn.v_proj.weight      Muon   matrix in Linear
        text_model.encoder.layers.*.self_attn.v_proj.bias        AdamW  bias
        text_model.encoder.layers.*.self_attn.q_proj.weight      Muon   matrix in Linear
        text_model.encoder.layers.*.self_attn.q_proj.bias        AdamW  bias
        text_model.encoder.layers.*.self_attn.out_proj.weight    Muon   matrix in Linear
        text_model.encoder.layers.*.self_attn.out_proj.bias      AdamW  bias
        text_model.encoder.layers.*.layer_norm1.weight           AdamW  norm
        text_model.encoder.layers.*.layer_norm1.bias             AdamW  norm
        text_model.encoder.layers.*.mlp.fc1.weight               Muon   matrix in Linear
        text_model.encoder.layers.*.mlp.fc1.bias                 AdamW  bias
        text_model.encoder.layers.*.mlp.fc2.weight               Muon   matrix in Linear
        text_model.encoder.layers.*.mlp.fc2.bias                 AdamW  bias
        text_model.encoder.layers.*.layer_norm2.weight           AdamW  norm
        text_model.encoder.layers.*.layer_norm2.bias             AdamW  norm
        text_model.final_layer_norm.weight                       AdamW  norm
        text_model.final_layer_norm.bias                         AdamW  norm
        vision_model.embeddings.class_embedding                  AdamW  vector
        vision_model.embeddings.patch_embedding.weight           AdamW  stem or patch embedding
        vision_model.embeddings.position_embedding.weight        AdamW  embedding
        vision_model.pre_layrnorm.weight                         AdamW  norm
        vision_model.pre_layrnorm.bias                           AdamW  norm
        vision_model.encoder.layers.*.self_attn.k_proj.weight    Muon   matrix in Linear
        vision_model.encoder.layers.*.self_attn.k_proj.bias      AdamW  bias
        vision_model.encoder.layers.*.self_attn.v_proj.weight    Muon   matrix in Linear
        vision_model.encoder.layers.*.self_attn.v_proj.bias      AdamW  bias
        vision_model.encoder.layers.*.self_attn.q_proj.weight    Muon   matrix in Linear
        vision_model.encoder.layers.*.self_attn.q_proj.bias      AdamW  bias
        vision_model.encoder.layers.*.self_attn.out_proj.weight  Muon   matrix in Linear
        vision_model.encoder.layers.*.self_attn.out_proj.bias    AdamW  bias
        vision_model.encoder.layers.*.layer_norm1.weight         AdamW  norm
        vision_model.encoder.layers.*.layer_norm1.bias           AdamW  norm
        vision_model.encoder.layers.*.mlp.fc1.weight             Muon   matrix in Linear
        vision_model.encoder.layers.*.mlp.fc1.bias               AdamW  bias
        vision_model.encoder.layers.*.mlp.fc2.weight             Muon   matrix in Linear
        vision_model.encoder.layers.*.mlp.fc2.bias               AdamW  bias
        vision_model.encoder.layers.*.layer_norm2.weight         AdamW  norm
        vision_model.encoder.layers.*.layer_norm2.bias           AdamW  norm
        vision_model.post_layernorm.weight                       AdamW  norm
        vision_model.post_layernorm.bias                         AdamW  norm
        visual_projection.weight                                 Muon   matrix in Linear
        text_projection.weight                                   Muon   matrix in Linear
    """,
    "gpt_oss": """
        model.embed_tokens.weight                       AdamW  embedding
        model.layers.*.self_attn.sinks                  AdamW  vector
        model.layers.*.self_attn.q_proj.weight          Muon   matrix in Linear
        model.layers.*.self_attn.q_proj.bias            AdamW  bias
        model.layers.*.self_attn.k_proj.weight          Muon   matrix in Linear
        model.layers.*.self_attn.k_proj.bias            AdamW  bias
        model.layers.*.self_attn.v_proj.weight          Muon   matrix in Linear
        model.layers.*.self_attn.v_proj.bias            AdamW  bias
        model.layers.*.self_attn.o_proj.weight          Muon   matrix in Linear
        model.layers.*.self_attn.o_proj.bias            AdamW  bias
        model.layers.*.mlp.router.weight                Muon   router
        model.layers.*.mlp.router.bias                  AdamW  bias
        model.layers.*.mlp.experts.gate_up_proj         Muon   stack of matrices in GptOssExperts, transposed, split: blocks(1, 1, interleaved=True, dim=1)
        model.layers.*.mlp.experts.gate_up_proj_bias    AdamW  bias
        model.layers.*.mlp.experts.down_proj            Muon   stack of matrices in GptOssExperts, transposed
        model.layers.*.mlp.experts.down_proj_bias       AdamW  bias
        model.layers.*.input_layernorm.weight           AdamW  norm
        model.layers.*.post_attention_layernorm.weight  AdamW  norm
        model.norm.weight                               AdamW  norm
        lm_head.weight                                  AdamW  output head
    """,  # noqa: E501
    "qwen3_next": """
        model.embed_tokens.weight                          AdamW  embedding
        model.layers.*.linear_attn.dt_bias                 AdamW  bias
        model.layers.*.linear_attn.A_log                   AdamW  vector
        model.layers.*.linear_attn.conv1d.weight           AdamW  depthwise convolution
        model.layers.*.linear_attn.in_proj_qkvz.weight     Muon   matrix in Linear, split: blocks(4, 4, 10, 10, interleaved=True)
        model.layers.*.linear_attn.in_proj_ba.weight       Muon   matrix in Linear
        model.layers.*.linear_attn.norm.weight             AdamW  norm
        model.layers.*.linear_attn.out_proj.weight         Muon   matrix in Linear
        model.layers.*.mlp.gate.weight                     Muon   router
        model.layers.*.mlp.experts.gate_up_proj            Muon   stack of matrices in Qwen3NextExperts, split: equal(2)
        model.layers.*.mlp.experts.down_proj               Muon   stack of matrices in Qwen3NextExperts
        model.layers.*.mlp.shared_expert.gate_proj.weight  Muon   matrix in Linear
        model.layers.*.mlp.shared_expert.up_proj.weight    Muon   matrix in Linear
        model.layers.*.mlp.shared_expert.down_proj.weight  Muon   matrix in Linear
        model.layers.*.mlp.shared_expert_gate.weight       AdamW  vector
        model.layers.*.input_layernorm.weight              AdamW  norm
        model.layers.*.post_attention_layernorm.weight     AdamW  norm
        model.layers.*.self_attn.q_proj.weight             Muon   matrix in Linear, split: blocks(4, 4, interleaved=True)
        model.layers.*.self_attn.k_proj.weight             Muon   matrix in Linear
        model.layers.*.self_attn.v_proj.weight             Muon   matrix in Linear
        model.layers.*.self_attn.o_proj.weight             Muon   matrix in Linear
        model.layers.*.self_attn.q_norm.weight             AdamW  norm
        model.layers.*.self_attn.k_norm.weight             AdamW  norm
        model.norm.weight                                  AdamW  norm
        lm_head.weight                                     AdamW  output head
    """,  # noqa: E501
    "modernbert": """
        model.embeddings.tok_embeddings.weight  AdamW  embedding
        model.embeddings.norm.weight            AdamW  norm
        model.layers.*.attn.Wqkv.weight         Muon   matrix in Linear, split: equal(3)
        model.layers.*.attn.Wo.weight           Muon   matrix in Linear
        model.layers.*.mlp_norm.weight          AdamW  norm
        model.layers.*.mlp.Wi.weight            Muon   matrix in Linear, split: equal(2)
        model.layers.*.mlp.Wo.weight            Muon   matrix in Linear
        model.final_norm.weight                 AdamW  norm
        head.dense.weight                       Muon   matrix in Linear
        head.norm.weight                        AdamW  norm
        classifier.weight                       AdamW  output head
        classifier.bias                         AdamW  bias
    """,
    "perceiver": """
        perceiver.input_preprocessor.embeddings.weight                               AdamW  embedding
        perceiver.input_preprocessor.position_embeddings.weight                      AdamW  embedding
        perceiver.embeddings.latents                                                 AdamW  embedding by name
        perceiver.encoder.cross_attention.attention.self.layernorm1.weight           AdamW  norm
        perceiver.encoder.cross_attention.attention.self.layernorm1.bias             AdamW  norm
        perceiver.encoder.cross_attention.attention.self.layernorm2.weight           AdamW  norm
        perceiver.encoder.cross_attention.attention.self.layernorm2.bias             AdamW  norm
        perceiver.encoder.cross_attention.attention.self.query.weight                Muon   matrix in Linear
        perceiver.encoder.cross_attention.attention.self.query.bias                  AdamW  bias
        perceiver.encoder.cross_attention.attention.self.key.weight                  Muon   matrix in Linear
        perceiver.encoder.cross_attention.attention.self.key.bias                    AdamW  bias
        perceiver.encoder.cross_attention.attention.self.value.weight                Muon   matrix in Linear
        perceiver.encoder.cross_attention.attention.self.value.bias                  AdamW  bias
        perceiver.encoder.cross_attention.attention.output.dense.weight              Muon   matrix in Linear
        perceiver.encoder.cross_attention.attention.output.dense.bias                AdamW  bias
        perceiver.encoder.cross_attention.layernorm.weight                           AdamW  norm
        perceiver.encoder.cross_attention.layernorm.bias                             AdamW  norm
        perceiver.encoder.cross_attention.mlp.dense1.weight                          Muon   matrix in Linear
        perceiver.encoder.cross_attention.mlp.dense1.bias                            AdamW  bias
        perceiver.encoder.cross_attention.mlp.dense2.weight                          Muon   matrix in Linear
        perceiver.encoder.cross_attention.mlp.dense2.bias                            AdamW  bias
        perceiver.encoder.self_attends.*.attention.self.layernorm1.weight            AdamW  norm
        perceiver.encoder.self_attends.*.attention.self.layernorm1.bias              AdamW  norm
        perceiver.encoder.self_attends.*.attention.self.query.weight                 Muon   matrix in Linear
        perceiver.encoder.self_attends.*.attention.self.query.bias                   AdamW  bias
        perceiver.encoder.self_attends.*.attention.self.key.weight                   Muon   matrix in Linear
        perceiver.encoder.self_attends.*.attention.self.key.bias                     AdamW  bias
        perceiver.encoder.self_attends.*.attention.self.value.weight                 Muon   matrix in Linear
        perceiver.encoder.self_attends.*.attention.self.value.bias                   AdamW  bias
        perceiver.encoder.self_attends.*.attention.output.dense.weight               Muon   matrix in Linear
        perceiver.encoder.self_attends.*.attention.output.dense.bias                 AdamW  bias
        perceiver.encoder.self_attends.*.layernorm.weight                            AdamW  norm
        perceiver.encoder.self_attends.*.layernorm.bias                              AdamW  norm
        perceiver.encoder.self_attends.*.mlp.dense1.weight                           Muon   matrix in Linear
        perceiver.encoder.self_attends.*.mlp.dense1.bias                             AdamW  bias
        perceiver.encoder.self_attends.*.mlp.dense2.weight                           Muon   matrix in Linear
        perceiver.encoder.self_attends.*.mlp.dense2.bias                             AdamW  bias
        perceiver.decoder.output_position_encodings.position_embeddings              AdamW  position table
        perceiver.decoder.decoding_cross_attention.attention.self.layernorm1.weight  AdamW  norm
        perceiver.decoder.decoding_cross_attention.attention.self.layernorm1.bias    AdamW  norm
        perceiver.decoder.decoding_cross_attention.attention.self.layernorm2.weight  AdamW  norm
        perceiver.decoder.decoding_cross_attention.attention.self.layernorm2.bias    AdamW  norm
        perceiver.decoder.decoding_cross_attention.attention.self.query.weight       Muon   matrix in Linear
        perceiver.decoder.decoding_cross_attention.attention.self.query.bias         AdamW  bias
        perceiver.decoder.decoding_cross_attention.attention.self.key.weight         Muon   matrix in Linear
        perceiver.decoder.decoding_cross_attention.attention.self.key.bias           AdamW  bias
        perceiver.decoder.decoding_cross_attention.attention.self.value.weight       Muon   matrix in Linear
        perceiver.decoder.decoding_cross_attention.attention.self.value.bias         AdamW  bias
        perceiver.decoder.decoding_cross_attention.attention.output.dense.weight     Muon   matrix in Linear
        perceiver.decoder.decoding_cross_attention.attention.output.dense.bias       AdamW  bias
        perceiver.decoder.decoding_cross_attention.layernorm.weight                  AdamW  norm
        perceiver.decoder.decoding_cross_attention.layernorm.bias                    AdamW  norm
        perceiver.decoder.decoding_cross_attention.mlp.dense1.weight                 Muon   matrix in Linear
        perceiver.decoder.decoding_cross_attention.mlp.dense1.bias                   AdamW  bias
        perceiver.decoder.decoding_cross_attention.mlp.dense2.weight                 Muon   matrix in Linear
        perceiver.decoder.decoding_cross_attention.mlp.dense2.bias                   AdamW  bias
        embedding_decoder.bias                                                       AdamW  bias
    """,
    "opt": """
        decoder.embed_tokens.weight                   AdamW  embedding
        decoder.embed_positions.weight                AdamW  embedding
        decoder.final_layer_norm.weight               AdamW  norm
        decoder.final_layer_norm.bias                 AdamW  norm
        decoder.layers.*.self_attn.k_proj.weight      Muon   matrix in Linear
        decoder.layers.*.self_attn.k_proj.bias        AdamW  bias
        decoder.layers.*.self_attn.v_proj.weight      Muon   matrix in Linear
        decoder.layers.*.self_attn.v_proj.bias        AdamW  bias
        decoder.layers.*.self_attn.q_proj.weight      Muon   matrix in Linear
        decoder.layers.*.self_attn.q_proj.bias        AdamW  bias
        decoder.layers.*.self_attn.out_proj.weight    Muon   matrix in Linear
        decoder.layers.*.self_attn.out_proj.bias      AdamW  bias
        decoder.layers.*.self_attn_layer_norm.weight  AdamW  norm
        decoder.layers.*.self_attn_layer_norm.bias    AdamW  norm
        decoder.layers.*.fc1.weight                   Muon   matrix in Linear
        decoder.layers.*.fc1.bias                     AdamW  bias
        decoder.layers.*.fc2.weight                   Muon   matrix in Linear
        decoder.layers.*.fc2.bias                     AdamW  bias
        decoder.layers.*.final_layer_norm.weight      AdamW  norm
        decoder.layers.*.final_layer_norm.bias        AdamW  norm
    """,
    "yolos": """
        vit.embeddings.cls_token                              AdamW  vector
        vit.embeddings.detection_tokens                       AdamW  embedding by name
        vit.embeddings.position_embeddings                    AdamW  position table
        vit.embeddings.patch_embeddings.projection.weight     AdamW  stem or patch embedding
        vit.embeddings.patch_embeddings.projection.bias       AdamW  bias
        vit.encoder.layer.*.attention.attention.query.weight  Muon   matrix in Linear
        vit.encoder.layer.*.attention.attention.query.bias    AdamW  bias
        vit.encoder.layer.*.attention.attention.key.weight    Muon   matrix in Linear
        vit.encoder.layer.*.attention.attention.key.bias      AdamW  bias
        vit.encoder.layer.*.attention.attention.value.weight  Muon   matrix in Linear
        vit.encoder.layer.*.attention.attention.value.bias    AdamW  bias
        vit.encoder.layer.*.attention.output.dense.weight     Muon   matrix in Linear
        vit.encoder.layer.*.attention.output.dense.bias       AdamW  bias
        vit.encoder.layer.*.intermediate.dense.weight         Muon   matrix in Linear
        vit.encoder.layer.*.intermediate.dense.bias           AdamW  bias
        vit.encoder.layer.*.output.dense.weight               Muon   matrix in Linear
        vit.encoder.layer.*.output.dense.bias                 AdamW  bias
        vit.encoder.layer.*.layernorm_before.weight           AdamW  norm
        vit.encoder.layer.*.layernorm_before.bias             AdamW  norm
        vit.encoder.layer.*.layernorm_after.weight            AdamW  norm
        vit.encoder.layer.*.layernorm_after.bias              AdamW  norm
        vit.layernorm.weight                                  AdamW  norm
        vit.layernorm.bias                                    AdamW  norm
        class_labels_classifier.layers.0.weight               Muon   matrix in Linear
        class_labels_classifier.layers.*.bias                 AdamW  bias
        class_labels_classifier.layers.1.weight               Muon   matrix in Linear
        class_labels_classifier.layers.2.weight               AdamW  output head
        bbox_predictor.layers.0.weight                        Muon   matrix in Linear
        bbox_predictor.layers.*.bias                          AdamW  bias
        bbox_predictor.layers.1.weight                        Muon   matrix in Linear
        bbox_predictor.layers.2.weight                        AdamW  output head
    """,
    "sam": """
        shared_image_embedding.positional_embedding                                  AdamW  position table, tied with prompt_encoder.shared_embedding.positional_embedding
        vision_encoder.pos_embed                                                     AdamW  position table
        vision_encoder.patch_embed.projection.weight                                 AdamW  stem or patch embedding
        vision_encoder.patch_embed.projection.bias                                   AdamW  bias
        vision_encoder.layers.*.layer_norm1.weight                                   AdamW  norm
        vision_encoder.layers.*.layer_norm1.bias                                     AdamW  norm
        vision_encoder.layers.*.attn.rel_pos_h                                       AdamW  position table
        vision_encoder.layers.*.attn.rel_pos_w                                       AdamW  position table
        vision_encoder.layers.*.attn.qkv.weight                                      Muon   matrix in Linear, split: equal(3)
        vision_encoder.layers.*.attn.qkv.bias                                        AdamW  bias
        vision_encoder.layers.*.attn.proj.weight                                     Muon   matrix in Linear
        vision_encoder.layers.*.attn.proj.bias                                       AdamW  bias
        vision_encoder.layers.*.layer_norm2.weight                                   AdamW  norm
        vision_encoder.layers.*.layer_norm2.bias                                     AdamW  norm
        vision_encoder.layers.*.mlp.lin1.weight                                      Muon   matrix in Linear
        vision_encoder.layers.*.mlp.lin1.bias                                        AdamW  bias
        vision_encoder.layers.*.mlp.lin2.weight                                      Muon   matrix in Linear
        vision_encoder.layers.*.mlp.lin2.bias                                        AdamW  bias
        vision_encoder.neck.conv1.weight                                             Muon   flattened to a matrix in Conv2d
        vision_encoder.neck.layer_norm1.weight                                       AdamW  norm
        vision_encoder.neck.layer_norm1.bias                                         AdamW  norm
        vision_encoder.neck.conv2.weight                                             Muon   flattened to a matrix in Conv2d
        vision_encoder.neck.layer_norm2.weight                                       AdamW  norm
        vision_encoder.neck.layer_norm2.bias                                         AdamW  norm
        prompt_encoder.mask_embed.conv1.weight                                       AdamW  stem or patch embedding
        prompt_encoder.mask_embed.conv1.bias                                         AdamW  bias
        prompt_encoder.mask_embed.conv2.weight                                       AdamW  stem or patch embedding
        prompt_encoder.mask_embed.conv2.bias                                         AdamW  bias
        prompt_encoder.mask_embed.conv3.weight                                       AdamW  embedding by name
        prompt_encoder.mask_embed.conv3.bias                                         AdamW  bias
        prompt_encoder.mask_embed.layer_norm1.weight                                 AdamW  norm
        prompt_encoder.mask_embed.layer_norm1.bias                                   AdamW  norm
        prompt_encoder.mask_embed.layer_norm2.weight                                 AdamW  norm
        prompt_encoder.mask_embed.layer_norm2.bias                                   AdamW  norm
        prompt_encoder.no_mask_embed.weight                                          AdamW  embedding
        prompt_encoder.point_embed.*.weight                                          AdamW  embedding
        prompt_encoder.not_a_point_embed.weight                                      AdamW  embedding
        mask_decoder.iou_token.weight                                                AdamW  embedding
        mask_decoder.mask_tokens.weight                                              AdamW  embedding
        mask_decoder.transformer.layers.*.self_attn.q_proj.weight                    Muon   matrix in Linear
        mask_decoder.transformer.layers.*.self_attn.q_proj.bias                      AdamW  bias
        mask_decoder.transformer.layers.*.self_attn.k_proj.weight                    Muon   matrix in Linear
        mask_decoder.transformer.layers.*.self_attn.k_proj.bias                      AdamW  bias
        mask_decoder.transformer.layers.*.self_attn.v_proj.weight                    Muon   matrix in Linear
        mask_decoder.transformer.layers.*.self_attn.v_proj.bias                      AdamW  bias
        mask_decoder.transformer.layers.*.self_attn.out_proj.weight                  Muon   matrix in Linear
        mask_decoder.transformer.layers.*.self_attn.out_proj.bias                    AdamW  bias
        mask_decoder.transformer.layers.*.layer_norm1.weight                         AdamW  norm
        mask_decoder.transformer.layers.*.layer_norm1.bias                           AdamW  norm
        mask_decoder.transformer.layers.*.cross_attn_token_to_image.q_proj.weight    Muon   matrix in Linear
        mask_decoder.transformer.layers.*.cross_attn_token_to_image.q_proj.bias      AdamW  bias
        mask_decoder.transformer.layers.*.cross_attn_token_to_image.k_proj.weight    Muon   matrix in Linear
        mask_decoder.transformer.layers.*.cross_attn_token_to_image.k_proj.bias      AdamW  bias
        mask_decoder.transformer.layers.*.cross_attn_token_to_image.v_proj.weight    Muon   matrix in Linear
        mask_decoder.transformer.layers.*.cross_attn_token_to_image.v_proj.bias      AdamW  bias
        mask_decoder.transformer.layers.*.cross_attn_token_to_image.out_proj.weight  Muon   matrix in Linear
        mask_decoder.transformer.layers.*.cross_attn_token_to_image.out_proj.bias    AdamW  bias
        mask_decoder.transformer.layers.*.layer_norm2.weight                         AdamW  norm
        mask_decoder.transformer.layers.*.layer_norm2.bias                           AdamW  norm
        mask_decoder.transformer.layers.*.mlp.lin1.weight                            Muon   matrix in Linear
        mask_decoder.transformer.layers.*.mlp.lin1.bias                              AdamW  bias
        mask_decoder.transformer.layers.*.mlp.lin2.weight                            Muon   matrix in Linear
        mask_decoder.transformer.layers.*.mlp.lin2.bias                              AdamW  bias
        mask_decoder.transformer.layers.*.layer_norm3.weight                         AdamW  norm
        mask_decoder.transformer.layers.*.layer_norm3.bias                           AdamW  norm
        mask_decoder.transformer.layers.*.layer_norm4.weight                         AdamW  norm
        mask_decoder.transformer.layers.*.layer_norm4.bias                           AdamW  norm
        mask_decoder.transformer.layers.*.cross_attn_image_to_token.q_proj.weight    Muon   matrix in Linear
        mask_decoder.transformer.layers.*.cross_attn_image_to_token.q_proj.bias      AdamW  bias
        mask_decoder.transformer.layers.*.cross_attn_image_to_token.k_proj.weight    Muon   matrix in Linear
        mask_decoder.transformer.layers.*.cross_attn_image_to_token.k_proj.bias      AdamW  bias
        mask_decoder.transformer.layers.*.cross_attn_image_to_token.v_proj.weight    Muon   matrix in Linear
        mask_decoder.transformer.layers.*.cross_attn_image_to_token.v_proj.bias      AdamW  bias
        mask_decoder.transformer.layers.*.cross_attn_image_to_token.out_proj.weight  Muon   matrix in Linear
        mask_decoder.transformer.layers.*.cross_attn_image_to_token.out_proj.bias    AdamW  bias
        mask_decoder.transformer.final_attn_token_to_image.q_proj.weight             Muon   matrix in Linear
        mask_decoder.transformer.final_attn_token_to_image.q_proj.bias               AdamW  bias
        mask_decoder.transformer.final_attn_token_to_image.k_proj.weight             Muon   matrix in Linear
        mask_decoder.transformer.final_attn_token_to_image.k_proj.bias               AdamW  bias
        mask_decoder.transformer.final_attn_token_to_image.v_proj.weight             Muon   matrix in Linear
        mask_decoder.transformer.final_attn_token_to_image.v_proj.bias               AdamW  bias
        mask_decoder.transformer.final_attn_token_to_image.out_proj.weight           Muon   matrix in Linear
        mask_decoder.transformer.final_attn_token_to_image.out_proj.bias             AdamW  bias
        mask_decoder.transformer.layer_norm_final_attn.weight                        AdamW  norm
        mask_decoder.transformer.layer_norm_final_attn.bias                          AdamW  norm
        mask_decoder.upscale_conv1.weight                                            Muon   flattened to a matrix in ConvTranspose2d, transposed
        mask_decoder.upscale_conv1.bias                                              AdamW  bias
        mask_decoder.upscale_conv2.weight                                            Muon   flattened to a matrix in ConvTranspose2d, transposed
        mask_decoder.upscale_conv2.bias                                              AdamW  bias
        mask_decoder.upscale_layer_norm.weight                                       AdamW  norm
        mask_decoder.upscale_layer_norm.bias                                         AdamW  norm
        mask_decoder.output_hypernetworks_mlps.*.proj_in.weight                      Muon   matrix in Linear
        mask_decoder.output_hypernetworks_mlps.*.proj_in.bias                        AdamW  bias
        mask_decoder.output_hypernetworks_mlps.*.proj_out.weight                     Muon   matrix in Linear
        mask_decoder.output_hypernetworks_mlps.*.proj_out.bias                       AdamW  bias
        mask_decoder.output_hypernetworks_mlps.*.layers.*.weight                     Muon   matrix in Linear
        mask_decoder.output_hypernetworks_mlps.*.layers.*.bias                       AdamW  bias
        mask_decoder.iou_prediction_head.proj_in.weight                              Muon   matrix in Linear
        mask_decoder.iou_prediction_head.proj_in.bias                                AdamW  bias
        mask_decoder.iou_prediction_head.proj_out.weight                             AdamW  output head
        mask_decoder.iou_prediction_head.proj_out.bias                               AdamW  bias
        mask_decoder.iou_prediction_head.layers.*.weight                             Muon   matrix in Linear
        mask_decoder.iou_prediction_head.layers.*.bias                               AdamW  bias
    """,  # noqa: E501
    "lora": """
        base_model.model.model.embed_tokens.base_layer.weight                   none   frozen
        base_model.model.model.embed_tokens.lora_embedding_A.default            AdamW  embedding by name
        base_model.model.model.embed_tokens.lora_embedding_B.default            AdamW  embedding by name
        base_model.model.model.layers.*.self_attn.q_proj.base_layer.weight      none   frozen
        base_model.model.model.layers.*.self_attn.q_proj.lora_A.default.weight  Muon   matrix in Linear
        base_model.model.model.layers.*.self_attn.q_proj.lora_B.default.weight  Muon   matrix in Linear
        base_model.model.model.layers.*.self_attn.k_proj.weight                 none   frozen
        base_model.model.model.layers.*.self_attn.v_proj.weight                 none   frozen
        base_model.model.model.layers.*.self_attn.o_proj.weight                 none   frozen
        base_model.model.model.layers.*.mlp.gate_proj.weight                    none   frozen
        base_model.model.model.layers.*.mlp.up_proj.weight                      none   frozen
        base_model.model.model.layers.*.mlp.down_proj.base_layer.weight         none   frozen
        base_model.model.model.layers.*.mlp.down_proj.lora_A.default.weight     Muon   matrix in Linear
        base_model.model.model.layers.*.mlp.down_proj.lora_B.default.weight     Muon   matrix in Linear
        base_model.model.model.layers.*.input_layernorm.weight                  none   frozen
        base_model.model.model.layers.*.post_attention_layernorm.weight         none   frozen
        base_model.model.model.norm.weight                                      none   frozen
        base_model.model.lm_head.original_module.weight                         none   frozen
        base_model.model.lm_head.modules_to_save.default.weight                 AdamW  output head
    """,
    "deit": """
        cls_token                  AdamW  vector
        pos_embed                  AdamW  position table
        dist_token                 AdamW  vector
        patch_embed.proj.weight    AdamW  stem or patch embedding
        patch_embed.proj.bias      AdamW  bias
        blocks.*.norm1.weight      AdamW  norm
        blocks.*.norm1.bias        AdamW  norm
        blocks.*.attn.qkv.weight   Muon   matrix in Linear, split: equal(3)
        blocks.*.attn.qkv.bias     AdamW  bias
        blocks.*.attn.proj.weight  Muon   matrix in Linear
        blocks.*.attn.proj.bias    AdamW  bias
        blocks.*.norm2.weight      AdamW  norm
        blocks.*.norm2.bias        AdamW  norm
        blocks.*.mlp.fc1.weight    Muon   matrix in Linear
        blocks.*.mlp.fc1.bias      AdamW  bias
        blocks.*.mlp.fc2.weight    Muon   matrix in Linear
        blocks.*.mlp.fc2.bias      AdamW  bias
        norm.weight                AdamW  norm
        norm.bias                  AdamW  norm
        head.weight                AdamW  output head
        head.bias                  AdamW  bias
        head_dist.weight           AdamW  output head
        head_dist.bias             AdamW  bias
    """,
    "levit": """
        stem.conv1.linear.weight                                   AdamW  stem or patch embedding
        stem.conv1.bn.weight                                       AdamW  norm
        stem.conv1.bn.bias                                         AdamW  norm
        stem.conv2.linear.weight                                   AdamW  stem or patch embedding
        stem.conv2.bn.weight                                       AdamW  norm
        stem.conv2.bn.bias                                         AdamW  norm
        stem.conv3.linear.weight                                   AdamW  stem or patch embedding
        stem.conv3.bn.weight                                       AdamW  norm
        stem.conv3.bn.bias                                         AdamW  norm
        stem.conv4.linear.weight                                   AdamW  stem or patch embedding
        stem.conv4.bn.weight                                       AdamW  norm
        stem.conv4.bn.bias                                         AdamW  norm
        stages.*.blocks.*.attn.attention_biases                    AdamW  bias
        stages.*.blocks.*.attn.qkv.linear.weight                   Muon   matrix in Linear, split: blocks(4, 4, 8, interleaved=True)
        stages.*.blocks.*.attn.qkv.bn.weight                       AdamW  norm
        stages.*.blocks.*.attn.qkv.bn.bias                         AdamW  norm
        stages.*.blocks.*.attn.proj.ln.linear.weight               Muon   matrix in Linear
        stages.*.blocks.*.attn.proj.ln.bn.weight                   AdamW  norm
        stages.*.blocks.*.attn.proj.ln.bn.bias                     AdamW  norm
        stages.*.blocks.*.mlp.ln1.linear.weight                    Muon   matrix in Linear
        stages.*.blocks.*.mlp.ln1.bn.weight                        AdamW  norm
        stages.*.blocks.*.mlp.ln1.bn.bias                          AdamW  norm
        stages.*.blocks.*.mlp.ln2.linear.weight                    Muon   matrix in Linear
        stages.*.blocks.*.mlp.ln2.bn.weight                        AdamW  norm
        stages.*.blocks.*.mlp.ln2.bn.bias                          AdamW  norm
        stages.*.downsample.attn_downsample.attention_biases       AdamW  bias
        stages.*.downsample.attn_downsample.kv.linear.weight       Muon   matrix in Linear, split: blocks(4, 16, interleaved=True)
        stages.*.downsample.attn_downsample.kv.bn.weight           AdamW  norm
        stages.*.downsample.attn_downsample.kv.bn.bias             AdamW  norm
        stages.*.downsample.attn_downsample.q.ln.linear.weight     Muon   matrix in Linear
        stages.*.downsample.attn_downsample.q.ln.bn.weight         AdamW  norm
        stages.*.downsample.attn_downsample.q.ln.bn.bias           AdamW  norm
        stages.*.downsample.attn_downsample.proj.ln.linear.weight  Muon   matrix in Linear
        stages.*.downsample.attn_downsample.proj.ln.bn.weight      AdamW  norm
        stages.*.downsample.attn_downsample.proj.ln.bn.bias        AdamW  norm
        stages.*.downsample.mlp.ln1.linear.weight                  Muon   matrix in Linear
        stages.*.downsample.mlp.ln1.bn.weight                      AdamW  norm
        stages.*.downsample.mlp.ln1.bn.bias                        AdamW  norm
        stages.*.downsample.mlp.ln2.linear.weight                  Muon   matrix in Linear
        stages.*.downsample.mlp.ln2.bn.weight                      AdamW  norm
        stages.*.downsample.mlp.ln2.bn.bias                        AdamW  norm
        head.bn.weight                                             AdamW  norm
        head.bn.bias                                               AdamW  norm
        head.linear.weight                                         AdamW  output head
        head.linear.bias                                           AdamW  bias
        head_dist.bn.weight                                        AdamW  norm
        head_dist.bn.bias                                          AdamW  norm
        head_dist.linear.weight                                    AdamW  output head
        head_dist.linear.bias                                      AdamW  bias
    """,  # noqa: E501
    "convnext_timm": """
        stem.0.weight                     AdamW  stem or patch embedding
        stem.0.bias                       AdamW  bias
        stem.1.weight                     AdamW  norm
        stem.1.bias                       AdamW  norm
        stages.*.blocks.*.gamma           AdamW  vector
        stages.*.blocks.*.conv_dw.weight  AdamW  depthwise convolution
        stages.*.blocks.*.conv_dw.bias    AdamW  bias
        stages.*.blocks.*.norm.weight     AdamW  norm
        stages.*.blocks.*.norm.bias       AdamW  norm
        stages.*.blocks.*.mlp.fc1.weight  Muon   flattened to a matrix in Conv2d
        stages.*.blocks.*.mlp.fc1.bias    AdamW  bias
        stages.*.blocks.*.mlp.fc2.weight  Muon   flattened to a matrix in Conv2d
        stages.*.blocks.*.mlp.fc2.bias    AdamW  bias
        stages.*.downsample.0.weight      AdamW  norm
        stages.*.downsample.0.bias        AdamW  norm
        stages.*.downsample.1.weight      Muon   flattened to a matrix in Conv2d
        stages.*.downsample.1.bias        AdamW  bias
        head.norm.weight                  AdamW  norm
        head.norm.bias                    AdamW  norm
        head.fc.weight                    AdamW  output head
        head.fc.bias                      AdamW  bias
    """,
    "efficientnet": """
        conv_stem.weight                  AdamW  stem or patch embedding
        bn1.weight                        AdamW  norm
        bn1.bias                          AdamW  norm
        blocks.*.*.conv_dw.weight         AdamW  depthwise convolution
        blocks.*.*.bn1.weight             AdamW  norm
        blocks.*.*.bn1.bias               AdamW  norm
        blocks.*.*.se.conv_reduce.weight  Muon   flattened to a matrix in Conv2d
        blocks.*.*.se.conv_reduce.bias    AdamW  bias
        blocks.*.*.se.conv_expand.weight  Muon   flattened to a matrix in Conv2d
        blocks.*.*.se.conv_expand.bias    AdamW  bias
        blocks.*.*.conv_pw.weight         Muon   flattened to a matrix in Conv2d
        blocks.*.*.bn2.weight             AdamW  norm
        blocks.*.*.bn2.bias               AdamW  norm
        blocks.*.*.conv_pwl.weight        Muon   flattened to a matrix in Conv2d
        blocks.*.*.bn3.weight             AdamW  norm
        blocks.*.*.bn3.bias               AdamW  norm
        conv_head.weight                  Muon   flattened to a matrix in Conv2d
        bn2.weight                        AdamW  norm
        bn2.bias                          AdamW  norm
        classifier.weight                 AdamW  output head
        classifier.bias                   AdamW  bias
    """,
    "resnet": """
        conv1.weight                  AdamW  stem or patch embedding
        bn1.weight                    AdamW  norm
        bn1.bias                      AdamW  norm
        layer1.*.conv1.weight         Muon   flattened to a matrix in Conv2d
        layer1.*.bn1.weight           AdamW  norm
        layer1.*.bn1.bias             AdamW  norm
        layer1.*.conv2.weight         Muon   flattened to a matrix in Conv2d
        layer1.*.bn2.weight           AdamW  norm
        layer1.*.bn2.bias             AdamW  norm
        layer1.*.downsample.0.weight  Muon   flattened to a matrix in Conv2d
        layer1.*.downsample.1.weight  AdamW  norm
        layer1.*.downsample.*.bias    AdamW  norm
        layer2.*.conv1.weight         Muon   flattened to a matrix in Conv2d
        layer2.*.bn1.weight           AdamW  norm
        layer2.*.bn1.bias             AdamW  norm
        layer2.*.conv2.weight         Muon   flattened to a matrix in Conv2d
        layer2.*.bn2.weight           AdamW  norm
        layer2.*.bn2.bias             AdamW  norm
        layer2.*.downsample.0.weight  Muon   flattened to a matrix in Conv2d
        layer2.*.downsample.1.weight  AdamW  norm
        layer2.*.downsample.*.bias    AdamW  norm
        layer3.*.conv1.weight         Muon   flattened to a matrix in Conv2d
        layer3.*.bn1.weight           AdamW  norm
        layer3.*.bn1.bias             AdamW  norm
        layer3.*.conv2.weight         Muon   flattened to a matrix in Conv2d
        layer3.*.bn2.weight           AdamW  norm
        layer3.*.bn2.bias             AdamW  norm
        layer3.*.downsample.0.weight  Muon   flattened to a matrix in Conv2d
        layer3.*.downsample.1.weight  AdamW  norm
        layer3.*.downsample.*.bias    AdamW  norm
        layer4.*.conv1.weight         Muon   flattened to a matrix in Conv2d
        layer4.*.bn1.weight           AdamW  norm
        layer4.*.bn1.bias             AdamW  norm
        layer4.*.conv2.weight         Muon   flattened to a matrix in Conv2d
        layer4.*.bn2.weight           AdamW  norm
        layer4.*.bn2.bias             AdamW  norm
        layer4.*.downsample.0.weight  Muon   flattened to a matrix in Conv2d
        layer4.*.downsample.1.weight  AdamW  norm
        layer4.*.downsample.*.bias    AdamW  norm
        fc.weight                     AdamW  output head
        fc.bias                       AdamW  bias
    """,
    "squeezenet": """
        features.*.weight            AdamW  stem or patch embedding
        features.*.bias              AdamW  bias
        features.*.squeeze.weight    Muon   flattened to a matrix in Conv2d
        features.*.squeeze.bias      AdamW  bias
        features.*.expand1x1.weight  Muon   flattened to a matrix in Conv2d
        features.*.expand1x1.bias    AdamW  bias
        features.*.expand3x3.weight  Muon   flattened to a matrix in Conv2d
        features.*.expand3x3.bias    AdamW  bias
        classifier.*.weight          AdamW  output head
        classifier.*.bias            AdamW  bias
    """,
}
# fmt: on


def expected(text: str) -> list[tuple[str, str, str]]:
    """(pattern, optimizer, what the table says) of every line."""
    lines = [line.split(maxsplit=2) for line in text.strip().splitlines()]
    return [(pattern, optimizer, says) for pattern, optimizer, says in lines]


@pytest.mark.parametrize("name", MODELS)
def test_table(name: str) -> None:
    groups = param_groups(MODELS[name](), split="auto")
    lines = expected(TABLES[name])
    used = set()
    for assignment in groups.assignments:
        matching = [line for line in lines if re.fullmatch(re.escape(line[0]).replace(r"\*", "[^.]+"), assignment.name)]
        assert len(matching) == 1, f"{assignment} should be expected once but is: {matching}"
        _, optimizer, says = matching[0]
        assert (assignment.optimizer, assignment.reason) == (optimizer, says), assignment
        used.add(matching[0])
    assert used == set(lines), "lines that match no parameter"
    # What Muon is told is what the table tells.
    turned = {a.name for a in groups.assignments if "transposed" in a.reason}
    cut = {a.name: a.reason.partition("split: ")[2] for a in groups.assignments if "split: " in a.reason}
    assert set(groups[0].get("transposed", ())) == turned and groups[0].get("split", {}) == cut
    MuonAdamW(groups)


def test_every_model_has_a_table() -> None:
    assert TABLES.keys() == MODELS.keys()


# ------------------------------------------------------------------------------------------------ cuts

# How the output of the layer depends on the tokens when a part of the weight is zero: "values" only where the last
# part, of the values, is; "gates" where the first is, whose activation multiplies all; "product" where either is.
VALUES, GATES, PRODUCT = (False, False, True), (True, False), (True, True)
CAUSAL = {**TEXT, "num_key_value_heads": 2}
FALCON = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64, "bias": False}
CUTS: dict[str, tuple[Callable[[], nn.Module], Mapping[str, tuple[bool, ...]]]] = {
    "gpt2": (MODELS["gpt2"], {"c_attn.weight": VALUES}),
    "qwen3_moe": (MODELS["qwen3_moe"], {"gate_up_proj": PRODUCT}),
    "gpt_oss": (MODELS["gpt_oss"], {"gate_up_proj": GATES}),
    "deepseek_v3": (MODELS["deepseek_v3"], {"0.self_attn.kv_b_proj.weight": (False, True), "gate_up_proj": PRODUCT}),
    "mamba": (MODELS["mamba"], {"in_proj.weight": PRODUCT}),
    "phi3": (model("Phi3ForCausalLM", **CAUSAL), {"qkv_proj.weight": VALUES, "gate_up_proj.weight": PRODUCT}),
    "gpt_neox": (model("GPTNeoXForCausalLM", **TEXT, attention_bias=False), {"query_key_value.weight": VALUES}),
    "persimmon": (
        model("PersimmonForCausalLM", **TEXT, qk_layernorm=False),
        {"query_key_value.weight": VALUES},
    ),
    "qwen3_next": (MODELS["qwen3_next"], {"in_proj_qkvz.weight": (True,) * 4}),
    "mpt": (model("MptForCausalLM", d_model=16, n_layers=1, n_heads=4, vocab_size=64), {"Wqkv.weight": VALUES}),
    "modernbert": (MODELS["modernbert"], {"Wqkv.weight": VALUES, "Wi.weight": PRODUCT}),
    "bigcode": (
        model("GPTBigCodeForCausalLM", n_embd=16, n_layer=1, n_head=4, vocab_size=64, n_positions=32),
        {"c_attn.weight": VALUES},
    ),
    "bigcode, all heads": (
        model(
            "GPTBigCodeForCausalLM", n_embd=16, n_layer=1, n_head=4, vocab_size=64, n_positions=32, multi_query=False
        ),
        {"c_attn.weight": VALUES},
    ),
    "falcon": (model("FalconForCausalLM", **FALCON), {"query_key_value.weight": VALUES}),
    "falcon, grouped": (
        model("FalconForCausalLM", **FALCON, new_decoder_architecture=True, num_kv_heads=2),
        {"query_key_value.weight": VALUES},
    ),
    "falcon, all heads": (model("FalconForCausalLM", **FALCON, multi_query=False), {"query_key_value.weight": VALUES}),
    "deit": (MODELS["deit"], {"qkv.weight": VALUES}),
    "levit": (
        MODELS["levit"],
        {"stages.0.blocks.0.attn.qkv.linear.weight": VALUES, "attn_downsample.kv.linear.weight": (False, True)},
    ),
}


def part(weight: Tensor, split: str, i: int) -> Tensor:
    """The i-th matrix of a weight, as a mask."""
    (piece,) = pieces(tuple(weight.shape), None, split, separate=True)[i : i + 1]
    assert piece is not None
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for run in range(piece.runs):
        mask.narrow(piece.dim, piece.start + run * piece.period, piece.size).fill_(True)
    return mask


@pytest.mark.parametrize("name", CUTS)
def test_cuts_are_where_the_model_cuts(name: str) -> None:
    """With one of the matrices zero, the layer's output depends on the tokens as the model's arithmetic has it."""
    torch.manual_seed(0)
    make, endings = CUTS[name]
    net = make().eval()
    with torch.no_grad():
        for key, p in net.named_parameters():
            p.copy_(torch.zeros_like(p) if key.endswith("bias") else torch.randn_like(p))
    x = torch.randn(2, 3, 64, 64) if hasattr(net, "forward_features") else torch.randint(3, 60, (2, 6))
    if name == "deit":
        x = x[..., :32, :32]
    cuts = param_groups(net, split="auto")[0]["split"]
    for ending, kills in endings.items():
        (weight,) = (key for key in cuts if key.endswith(ending))
        layer = weight.removesuffix(".weight").removesuffix(".linear").rpartition(".")[0]
        outputs: list[Tensor] = []
        hook = net.get_submodule(layer).register_forward_hook(
            lambda _module, _args, out, into=outputs: into.append(out[0] if isinstance(out, tuple) else out)
        )
        p = net.get_parameter(weight)
        whole = p.detach().clone()
        masks = [part(whole, cuts[weight], i) for i in range(len(kills))]
        assert torch.equal(sum(mask.int() for mask in masks), torch.ones_like(whole, dtype=torch.int))
        for mask in masks:
            with torch.no_grad():
                p.copy_(whole.masked_fill(mask, 0))
                net(x)
                p.copy_(whole)
        hook.remove()
        assert tuple(not out.any() for out in outputs) == kills, weight

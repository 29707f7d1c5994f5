"""The models of three zoos at tiny size: (model, args, kwargs) of a training step."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxprop.cli.models.sources import draw_zeros

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

# ruff: noqa: C408 - keyword arguments read better in the long table
# one small model of each family
TIMM = """beit_base_patch16_224 cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convit_tiny convmixer_768_32
convnext_atto convnextv2_atto crossvit_tiny_240 cspresnet50 davit_tiny deit_tiny_patch16_224 densenet121
dla34 dpn48b edgenext_xx_small efficientformer_l1 efficientnet_b0 tf_efficientnet_b0 eva02_tiny_patch14_224
fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 gmlp_ti16_224 hardcorenas_a hgnet_tiny hiera_tiny_224
hrnet_w18_small inception_v4 inception_next_tiny levit_128s maxvit_tiny_tf_224 mixer_s32_224 mobileone_s0
mobilevit_xxs mobilevitv2_050 mvitv2_tiny dm_nfnet_f0 nf_resnet50 nest_tiny pit_ti_224 poolformer_s12
pvt_v2_b0 regnety_002 repvgg_a0 res2net50_26w_4s resmlp_12_224 resnest14d resnet18 resnetv2_50 rexnet_100
selecsls42 seresnet50 sequencer2d_s skresnet18 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tinynet_e
tnt_s_patch16_224 tresnet_m twins_pcpvt_small vgg11 visformer_tiny vit_tiny_patch16_224 volo_d1_224
vovnet39a wide_resnet50_2 xception41 xcit_nano_12_p16_224""".split()

TRANSFORMERS = """BertForSequenceClassification BertForMaskedLM RobertaForMaskedLM DistilBertForMaskedLM
AlbertForMaskedLM ElectraForMaskedLM DebertaV2ForMaskedLM ModernBertForMaskedLM GPT2LMHeadModel
GPTNeoXForCausalLM OPTForCausalLM BloomForCausalLM FalconForCausalLM LlamaForCausalLM MistralForCausalLM
Qwen2ForCausalLM Qwen3ForCausalLM GemmaForCausalLM Gemma2ForCausalLM PhiForCausalLM MixtralForCausalLM
Qwen2MoeForCausalLM T5ForConditionalGeneration BartForConditionalGeneration MarianMTModel
PegasusForConditionalGeneration WhisperForConditionalGeneration ViTForImageClassification
DeiTForImageClassification BeitForImageClassification SwinForImageClassification
ConvNextForImageClassification SegformerForImageClassification ResNetForImageClassification CLIPModel
SiglipModel Wav2Vec2ForCTC HubertForCTC""".split()

_SMALL: dict[str, Any] = dict(
    hidden_size=32, d_model=32, dim=32, n_embd=32, embedding_size=32, word_embed_proj_dim=32,
    num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2, encoder_layers=2, decoder_layers=2,
    intermediate_size=64, encoder_ffn_dim=64, decoder_ffn_dim=64, ffn_dim=64, hidden_dim=64, d_ff=64,
    d_kv=8,    num_attention_heads=4, n_heads=4, n_head=4, num_heads=4, encoder_attention_heads=4,
    decoder_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=99, num_local_experts=4,
    num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, image_size=32, patch_size=8, max_position_embeddings=64, num_mel_bins=8,
    max_source_positions=20, max_target_positions=20, conv_dim=(16,) * 7, num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4, mask_time_prob=0.0, attention_dropout=0.0, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, layerdrop=0.0,
)  # fmt: skip


def names_of(library: str) -> list[str]:
    """The models of a library that are tried."""
    if library == "torchvision":
        from torchvision import models

        quantized = set(models.list_models(models.quantization))
        return [name for name in models.list_models() if name not in quantized]
    return TIMM if library == "timm" else TRANSFORMERS


def torchvision_case(name: str) -> Case:
    from torchvision import models

    arguments: dict[str, Any] = {}
    builder = models.get_model_builder(name)
    if "weights_backbone" in builder.__annotations__:
        arguments["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    model = builder(**arguments).train()
    if name in models.list_models(models.detection):
        return model, detection_inputs(name, model), {}
    if name.startswith("raft"):
        return model, (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)), {}
    if name in models.list_models(models.video):
        frames, side = (16, 224) if name.startswith(("mvit", "s3d")) else (4, 64)
        return model, (torch.rand(2, 3, frames, side, side),), {}
    side = getattr(model, "image_size", {"inception_v3": 299, "maxvit_t": 224}.get(name, 64))
    return model, (torch.rand(2, 3, side, side),), {}


def detection_inputs(name: str, model: Any) -> tuple[Any, ...]:
    """Two images with one object each; the model is told not to enlarge them."""
    if not name.startswith("ssd"):
        model.transform.min_size, model.transform.max_size = (128,), 160
    images = [torch.rand(3, 96, 128), torch.rand(3, 120, 100)]
    targets = []
    for image in images:
        target = {"boxes": torch.tensor([[5.0, 5.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
        if name.startswith("mask"):
            target["masks"] = torch.ones(1, *image.shape[1:], dtype=torch.uint8)
        if name.startswith("keypoint"):
            target["keypoints"] = torch.full((1, 17, 3), 30.0).index_fill_(2, torch.tensor([2]), 1.0)
        targets.append(target)
    return images, targets


def timm_case(name: str) -> Case:
    import timm

    model = timm.create_model(name).train()
    draw_zeros(model)
    size = model.default_cfg["input_size"]
    fixed = model.default_cfg.get("fixed_input_size", False) or size[-1] < 200
    return model, (torch.rand(2, *(size if fixed else (3, 128, 128))),), {}


def transformers_case(name: str) -> Case:
    import transformers

    cls = getattr(transformers, name)
    known = inspect.signature(cls.config_class).parameters
    default = cls.config_class()
    fixed = {k for k in _SMALL if isinstance(getattr(cls.config_class, k, None), property)}
    small = {k: v for k, v in _SMALL.items() if (k in known or hasattr(default, k)) and k not in fixed}
    if name in ("CLIPModel", "SiglipModel"):
        parts = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
        part = {k: v for k, v in _SMALL.items() if k in parts}
        ids = {"vocab_size": 99, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
        small = {
            "text_config": {**part, **ids, "pad_token_id": 0, "projection_size": 32},
            "vision_config": {**part, "image_size": 32, "patch_size": 8},
        }
    elif getattr(default, "is_encoder_decoder", False):
        small["decoder_start_token_id"] = 0
    if name.startswith(("Swin", "ConvNext", "Segformer", "ResNet")):
        small = {}
    model = cls(cls.config_class(**small)).train()
    return model, (), inputs_for(name, model)


def inputs_for(name: str, model: Any) -> dict[str, Any]:
    """Inputs with labels, so that the model computes its loss."""
    ids, labels = torch.randint(3, 99, (2, 10)), torch.randint(3, 99, (2, 10))
    side = getattr(model.config, "image_size", None) or 64
    side = 32 if name in ("CLIPModel", "SiglipModel") else side
    images = torch.rand(2, 3, side, side)
    if name in ("CLIPModel", "SiglipModel"):
        return {"input_ids": ids, "pixel_values": images, "return_loss": True}
    if name.endswith("ImageClassification"):
        return {"pixel_values": images, "labels": torch.tensor([0, 1])}
    if name.endswith("CTC"):
        return {"input_values": torch.rand(2, 2000), "labels": labels[:, :3]}
    if name.startswith("Whisper"):
        return {"input_features": torch.rand(2, 8, 40), "labels": labels}
    if name.endswith("SequenceClassification"):
        return {"input_ids": ids, "labels": torch.tensor([0, 1])}
    return {"input_ids": ids, "labels": labels}


LIBRARIES: dict[str, Callable[[str], Case]] = {
    "torchvision": torchvision_case,
    "timm": timm_case,
    "transformers": transformers_case,
}

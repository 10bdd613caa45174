"""Architectures of transformers, timm and peft: their classes, tiny, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from architectures.plain import classes, images, tokens
from architectures.table import Problem, architecture

VOCABULARY, LENGTH = 40, 6
CE = nn.CrossEntropyLoss()


def hugging_face(name: str, **options: Any) -> Any:
    return architecture(name, packages=("transformers",), **options)


def position_scores(model: nn.Module, x: Any) -> Tensor:
    """Logits of every position, the class as second axis; nothing is kept for a next call."""
    x = x if isinstance(x, dict) else {"input_ids": x}
    return model(**x, use_cache=False).logits.mT


def masked_scores(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logits.mT


def pixel_scores(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logits


def language_model(made: nn.Module) -> Problem:
    """The next token of every position."""
    ids = tokens(LENGTH + 1, VOCABULARY)
    return Problem(made, ids[:, :-1], ids[:, 1:], CE, position_scores)


def masked_language_model(made: nn.Module) -> Problem:
    """The tokens at some positions; the others are no terms of the loss."""
    ids = tokens(LENGTH, VOCABULARY)
    y = torch.where(torch.rand(ids.shape) < 0.5, ids, -100)
    y[:, 0] = ids[:, 0]
    return Problem(made, ids, y, CE, masked_scores)


def text_classifier(made: nn.Module) -> Problem:
    return Problem(made, tokens(LENGTH, VOCABULARY), classes(3), CE)


def image_classifier(made: nn.Module, size: int = 16) -> Problem:
    return Problem(made, images(3, size), classes(3), CE)


def encoder_decoder(made: nn.Module) -> Problem:
    """The next token of a second sequence, given a first one."""
    ids = tokens(LENGTH, VOCABULARY)
    x = {"input_ids": tokens(5, VOCABULARY), "decoder_input_ids": ids[:, :-1]}
    return Problem(made, x, ids[:, 1:], CE, position_scores)


# Causal language models ------------------------------------------------------------------------

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def gpt2_config(transformers: Any) -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH + 2,
        n_embd=32,
        n_layer=3,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )


@hugging_face("GPT-2", share=0.999, quick=True)
def gpt2(transformers):
    return language_model(transformers.GPT2LMHeadModel(gpt2_config(transformers)))


@hugging_face("Llama", share=0.999, float32=True, quick=True)
def llama(transformers):
    return language_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))


@hugging_face("Qwen2", share=0.999, float32=True)
def qwen2(transformers):
    return language_model(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)))


@hugging_face("Gemma-2", share=0.999, float32=True)
def gemma2(transformers):
    config = transformers.Gemma2Config(**LLAMA, query_pre_attn_scalar=8, sliding_window=4)
    return language_model(transformers.Gemma2ForCausalLM(config))


@hugging_face("Mixtral", share=0.999, float32=True)
def mixtral(transformers):
    config = transformers.MixtralConfig(
        **LLAMA, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager"
    )
    return language_model(transformers.MixtralForCausalLM(config))


@hugging_face("OPT", share=0.999)
def opt(transformers):
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH + 2,
        word_embed_proj_dim=16,
        pad_token_id=1,
    )
    return language_model(transformers.OPTForCausalLM(config))


@hugging_face("GPT-NeoX", share=0.999)
def gpt_neox(transformers):
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return language_model(transformers.GPTNeoXForCausalLM(config))


@hugging_face("Mamba", share=0.94, float32=True, cast=("mixer.D", "dt_proj.bias"))
def mamba(transformers):
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        state_size=4,
        num_hidden_layers=2,
        conv_kernel=3,
        time_step_rank=2,
        use_mambapy=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return language_model(transformers.MambaForCausalLM(config))


@hugging_face("XLNet", share=0.979)
def xlnet(transformers):
    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=32, dropout=0.0
    )
    problem = masked_language_model(transformers.XLNetLMHeadModel(config))
    return problem


# Encoders --------------------------------------------------------------------------------------

BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH + 2,
    "type_vocab_size": 2,
    "num_labels": 3,
}


@hugging_face("BERT, classifier", share=0.999, exact=True, quick=True)
def bert_classifier(transformers):
    config = transformers.BertConfig(**BERT)
    return text_classifier(transformers.BertForSequenceClassification(config))


@hugging_face("BERT, masked language model", share=0.999)
def bert_masked(transformers):
    return masked_language_model(transformers.BertForMaskedLM(transformers.BertConfig(**BERT)))


@hugging_face("RoBERTa", share=0.999, exact=True)
def roberta(transformers):
    config = transformers.RobertaConfig(**BERT, pad_token_id=1)
    return text_classifier(transformers.RobertaForSequenceClassification(config))


@hugging_face("DistilBERT", share=0.999, exact=True)
def distilbert(transformers):
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=16,
        hidden_dim=32,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=LENGTH,
        num_labels=3,
    )
    return text_classifier(transformers.DistilBertForSequenceClassification(config))


@hugging_face("ALBERT", share=0.999, exact=True)
def albert(transformers):
    config = transformers.AlbertConfig(**BERT, embedding_size=8)
    return text_classifier(transformers.AlbertForSequenceClassification(config))


@hugging_face("DeBERTa", share=0.8, float32=True, exact=True)
def deberta(transformers):
    config = transformers.DebertaConfig(
        **BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8
    )
    return text_classifier(transformers.DebertaForSequenceClassification(config))


@hugging_face("Perceiver", share=0.978, exact=True)
def perceiver(transformers):
    config = transformers.PerceiverConfig(
        vocab_size=VOCABULARY,
        num_latents=4,
        d_latents=12,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        max_position_embeddings=LENGTH,
        num_labels=3,
    )
    return text_classifier(transformers.PerceiverForSequenceClassification(config))


# Encoder and decoder ---------------------------------------------------------------------------


@hugging_face("T5", share=0.988, float32=True)
def t5(transformers):
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return encoder_decoder(transformers.T5ForConditionalGeneration(config))


@hugging_face("BART", share=0.999)
def bart(transformers):
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=LENGTH,
    )
    return encoder_decoder(transformers.BartForConditionalGeneration(config))


# Images and sound ------------------------------------------------------------------------------

VIT = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 3,
}


@hugging_face("ViT", share=0.999, exact=True, quick=True)
def vit(transformers):
    return image_classifier(transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)))


@hugging_face("DeiT", share=0.999, exact=True)
def deit(transformers):
    return image_classifier(transformers.DeiTForImageClassification(transformers.DeiTConfig(**VIT)))


@hugging_face("DINOv2", share=0.997, exact=True)
def dinov2(transformers):
    config = transformers.Dinov2Config(**{k: v for k, v in VIT.items() if k != "intermediate_size"})
    return image_classifier(transformers.Dinov2ForImageClassification(config))


@hugging_face("Swin", share=0.966, exact=True)
def swin(transformers):
    config = transformers.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[1, 2],
        window_size=4,
        num_labels=3,
    )
    return image_classifier(transformers.SwinForImageClassification(config))


@hugging_face("ConvNeXt", share=0.999, exact=True)
def convnext(transformers):
    config = transformers.ConvNextConfig(
        patch_size=2, num_stages=2, hidden_sizes=[6, 8], depths=[1, 1], num_labels=3
    )
    return image_classifier(transformers.ConvNextForImageClassification(config))


@hugging_face("SegFormer", share=0.999)
def segformer(transformers):
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 12],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=3,
    )
    made = transformers.SegformerForSemanticSegmentation(config)
    y = torch.randint(3, (4, 8, 8))
    return Problem(made, images(3, 16), y, CE, pixel_scores)


@hugging_face("CLIP", share=0.999)
def clip(transformers):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "num_attention_heads": 2}
    text |= {"bos_token_id": 0, "eos_token_id": VOCABULARY - 1, "pad_token_id": 1}
    vision = {"image_size": 16, "patch_size": 8, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=size | text, vision_config=size | vision, projection_dim=8
    )
    ids = tokens(LENGTH, VOCABULARY)
    ids[:, -1] = VOCABULARY - 1
    x = {"input_ids": ids, "pixel_values": images(3, 16)}

    def embeddings(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
        out = model(**x)
        return torch.cat([out.text_embeds, out.image_embeds], 1)

    y = torch.randn(4, 16, dtype=torch.float64)
    return Problem(transformers.CLIPModel(config), x, y, nn.MSELoss(), embeddings)


@hugging_face("Wav2Vec2", share=0.842, exact=True)
def wav2vec2(transformers):
    config = transformers.Wav2Vec2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=(8, 8),
        conv_kernel=(5, 3),
        conv_stride=(3, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        num_labels=3,
    )
    made = transformers.Wav2Vec2ForSequenceClassification(config)
    return Problem(made, torch.randn(4, 60, dtype=torch.float64), classes(3), CE)


# Adapters --------------------------------------------------------------------------------------


@architecture("LoRA on GPT-2", share=0.999, packages=("transformers", "peft"))
def lora(transformers, peft):
    base = transformers.GPT2LMHeadModel(gpt2_config(transformers))
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    return language_model(peft.get_peft_model(base, config))


@architecture(
    "LoRA on Llama", share=0.999, float32=True, quick=True, packages=("transformers", "peft")
)
def lora_llama(transformers, peft):
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return language_model(peft.get_peft_model(base, config))


@architecture("IA3 on Llama", share=0.999, float32=True, packages=("transformers", "peft"))
def ia3(transformers, peft):
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    return language_model(peft.get_peft_model(base, config))


# timm ------------------------------------------------------------------------------------------


def image_models(name: str, **options: Any) -> Any:
    return architecture(f"timm {name}", packages=("timm",), exact=True, **options)


@image_models("ResNet", share=0.999, quick=True)
def timm_resnet(timm):
    models = timm.models.resnet
    made = models.ResNet(
        models.BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(4, 4, 6, 6), stem_width=4
    )
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return image_classifier(made)


@image_models("ConvNeXt", share=0.999, quick=True)
def timm_convnext(timm):
    made = timm.models.convnext.ConvNeXt(
        num_classes=3, depths=(1, 1, 1, 1), dims=(4, 4, 6, 6), kernel_sizes=3, patch_size=2
    )
    return image_classifier(made, 32)


@image_models("Swin", share=0.966)
def timm_swin(timm):
    made = timm.models.swin_transformer.SwinTransformer(
        img_size=16,
        patch_size=2,
        num_classes=3,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(1, 2),
        window_size=4,
    )
    return image_classifier(made)


@image_models("MLP-Mixer", share=0.999, quick=True)
def timm_mixer(timm):
    made = timm.models.mlp_mixer.MlpMixer(
        num_classes=3, img_size=16, patch_size=4, num_blocks=2, embed_dim=12
    )
    return image_classifier(made)


@image_models("EfficientNet", share=0.999)
def timm_efficientnet(timm):
    blocks = timm.models._efficientnet_builder.decode_arch_def(
        [["ds_r1_k3_s1_c6_se0.25"], ["ir_r1_k3_s2_e2_c8_se0.25"]]
    )
    made = timm.models.efficientnet.EfficientNet(
        block_args=blocks, num_classes=3, num_features=12, stem_size=4
    )
    return image_classifier(made)

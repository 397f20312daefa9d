"""Tiny random models of each family with their tokenizers and image processors, saved as folders:
what test_encode.py encodes with, no download."""

from pathlib import Path

import torch

TEXTS = ["a man in a red shirt climbs a wall .", "two dogs run over the wet sand",
         "a child in a pink dress is climbing up a set of stairs", "Snow!"]


def save_tokenizer(folder, padding_side="right", bos="<s>", eos="</s>", mask=None, wrap=""):
    """A byte-level BPE of a few merges. wrap: a template such as "<s> $A </s>" for the special tokens
    that it adds itself."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    specials = list(dict.fromkeys(t for t in ("<pad>", bos, eos, mask) if t))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
                                      tokenizers.decoders.ByteLevel())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=specials,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                             show_progress=False)
    bpe.train_from_iterator(TEXTS, trainer)
    if wrap:
        used = [t for t in (bos, eos) if t and t in wrap]
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single=wrap, special_tokens=[(t, bpe.token_to_id(t)) for t in used])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token=bos, eos_token=eos,
                                        mask_token=mask, padding_side=padding_side, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder, kind, **options):
    """Save the tiny model `kind` with all that goes with it; returns the folder as a str."""
    import transformers as t
    folder, (vocab, size) = Path(folder), (320, {"height": 32, "width": 32})
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(len(kind))
    processor = None
    if kind in ("mistral", "llama"):
        config = getattr(t, f"{kind.capitalize()}Config")(**small, vocab_size=vocab, num_key_value_heads=2,
                                                          max_position_embeddings=64)
        model = getattr(t, f"{kind.capitalize()}ForCausalLM")(config) if kind == "llama" else t.MistralModel(config)
        save_tokenizer(folder, **{"padding_side": "left", "wrap": "<s> $A", **options})
    elif kind in ("gemma2", "cohere"):
        name, options = {"gemma2": ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
                         "cohere": ("Cohere", {"logit_scale": 0.3})}[kind]
        config = getattr(t, f"{name}Config")(**small, **options, vocab_size=vocab, num_key_value_heads=2,
                                             max_position_embeddings=64)
        model = getattr(t, f"{name}ForCausalLM")(config)
        save_tokenizer(folder, wrap="<s> $A")
    elif kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=64, vocab_size=vocab))
        save_tokenizer(folder, bos="</s>", **options)
    elif kind == "bloom":
        model = t.BloomForCausalLM(t.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=vocab))
        save_tokenizer(folder, padding_side="left", **options)
    elif kind == "bert":
        model = t.BertModel(t.BertConfig(**small, vocab_size=vocab, max_position_embeddings=64))
        save_tokenizer(folder, wrap="<s> $A </s>", mask="<mask>", **options)
    elif kind == "roberta":
        config = t.RobertaConfig(**small, vocab_size=vocab, max_position_embeddings=66, pad_token_id=0)
        model = t.RobertaModel(config)
        save_tokenizer(folder, wrap="<s> $A </s>", **options)
    elif kind == "siglip":
        text = {**small, "vocab_size": vocab, "max_position_embeddings": 24, "projection_size": 16}
        model, processor = (t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision)),
                            t.SiglipImageProcessorPil(size=size))
        save_tokenizer(folder, wrap="$A </s>")
    elif kind == "clip":
        tokenizer = save_tokenizer(folder, wrap="<s> $A </s>")
        text = {**small, "vocab_size": vocab, "max_position_embeddings": 48, "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        processor = t.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    elif kind == "blip2":
        text = {"model_type": "t5", "d_model": 20, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
                "vocab_size": vocab, "decoder_start_token_id": 0, "tie_word_embeddings": False}
        qformer = {**small, "encoder_hidden_size": 16, "vocab_size": vocab, "max_position_embeddings": 32}
        model = t.Blip2ForConditionalGeneration(t.Blip2Config(
            vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4))
        processor = t.BlipImageProcessorPil(size=size)
        save_tokenizer(folder, wrap="$A </s>")
    elif kind == "vit":
        model, processor = t.ViTModel(t.ViTConfig(**vision)), t.ViTImageProcessorPil(size=size)
    elif kind in ("siglip_vision", "clip_vision"):
        name = {"siglip_vision": "Siglip", "clip_vision": "CLIP"}[kind]
        model, processor = (getattr(t, f"{name}VisionModel")(getattr(t, f"{name}VisionConfig")(**vision)),
                            t.SiglipImageProcessorPil(size=size))
    elif kind == "ijepa":
        model, processor = t.IJepaModel(t.IJepaConfig(**vision)), t.ViTImageProcessorPil(size=size)
    elif kind == "convnext":
        config = t.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], image_size=32)
        model, processor = t.ConvNextModel(config), t.ViTImageProcessorPil(size=size)
    elif kind == "whisper":
        config = t.WhisperConfig(d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
                                 decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=vocab,
                                 num_mel_bins=16, max_source_positions=100, pad_token_id=0, bos_token_id=1,
                                 eos_token_id=2, decoder_start_token_id=1)
        model, processor = t.WhisperModel(config), t.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    elif kind == "wav2vec2":
        config = t.Wav2Vec2Config(**small, vocab_size=vocab, conv_dim=[8, 8], conv_stride=[80, 4], conv_kernel=[80, 4],
                                  num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
        model, processor = t.Wav2Vec2Model(config), t.Wav2Vec2FeatureExtractor()
    elif kind == "vit_mae":
        decoder = {"decoder_hidden_size": 16, "decoder_intermediate_size": 24, "decoder_num_hidden_layers": 1,
                   "decoder_num_attention_heads": 2}
        model, processor = (t.ViTMAEForPreTraining(t.ViTMAEConfig(**vision, **decoder)),
                            t.ViTImageProcessorPil(size=size))
    elif kind == "dinov2":
        options = {k: v for k, v in vision.items() if k != "intermediate_size"}
        model, processor = (t.Dinov2Model(t.Dinov2Config(**options)),
                            t.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=size))
    for parameter in model.parameters():  # the usual small initialisation makes all rows nearly alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if processor:
        processor.save_pretrained(folder)
    return str(folder)

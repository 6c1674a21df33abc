"""ImageReward (arXiv 2304.05977), BLIP and a linear head, standardised: about -2 to 2."""
from _original import linear_head, load_original, renamed
from rsaft import clip_pixels, make_tokenize

FILES = {"ImageReward.pt": "zai-org/ImageReward", "tokenizer_config.json": "google-bert/bert-base-uncased"}

BLIP_LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                  image_size=224, patch_size=16, layer_norm_eps=1e-6)
BLIP_TEXT = dict(vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12, is_decoder=True)

BLIP_VISION = (  # ImageReward's names to those of transformers' BlipVisionModel
    (r"^(cls_token)$", "embeddings.class_embedding"), (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."), (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."), (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."), (r"\.attn\.proj\.", ".self_attn.projection."))


def take(state, prefix):
    """What of a checkpoint has this prefix, without it; it is removed there."""
    return {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}


def load_blip(state, tokenizer_source, length, device):
    """BLIP's text feature that has seen the image, a function (images, prompts) -> (B, 768).

    state: a checkpoint; what is BLIP's in it is removed. length: of the prompts, in tokens.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
    from transformers.initialization import no_init_weights
    with no_init_weights():    # all are loaded: random numbers would take seconds
        vision = BlipVisionModel(BlipVisionConfig(**BLIP_LARGE))
        # A "decoder" has cross attention.
        text = BlipTextModel(BlipTextConfig(**BLIP_TEXT), add_pooling_layer=False)
    for unused in "blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids":
        take(state, unused)
    vision.load_state_dict(renamed(take(state, "blip.visual_encoder."), BLIP_VISION))
    text.load_state_dict(take(state, "blip.text_encoder."))
    for module in vision, text:
        module.to(device).eval().requires_grad_(False)
    tokenize = make_tokenize(tokenizer_source, length, device)

    def features(images, prompts):
        image = vision(pixel_values=clip_pixels(images, BLIP_LARGE["image_size"])).last_hidden_state
        states = text(**tokenize(prompts), encoder_hidden_states=image, is_decoder=False).last_hidden_state
        return states[:, 0]

    return features


def load(folders, device):
    state = load_original(folders, "ImageReward.pt")
    features = load_blip(state, folders["tokenizer_config.json"], 35, device)
    head = linear_head(take(state, "mlp.")).to(device).requires_grad_(False)
    if state:
        raise ValueError(f"unexpected keys {list(state)}")
    return lambda images, prompts: (head(features(images, prompts))[:, 0]
                                    - 0.16717362830052426) / 1.0333394966054072

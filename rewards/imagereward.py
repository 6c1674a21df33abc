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


def load(folders, device):
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
    from transformers.initialization import no_init_weights
    with no_init_weights():    # all are loaded: random numbers would take seconds
        vision = BlipVisionModel(BlipVisionConfig(**BLIP_LARGE))
        text = BlipTextModel(BlipTextConfig(**BLIP_TEXT), add_pooling_layer=False)  # a "decoder" has cross attention
    state = load_original(folders, "ImageReward.pt")

    def part(prefix):
        return {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}

    for unused in "blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids":
        part(unused)
    vision.load_state_dict(renamed(part("blip.visual_encoder."), BLIP_VISION))
    text.load_state_dict(part("blip.text_encoder."))
    head = linear_head(part("mlp."))
    if state:
        raise ValueError(f"unexpected keys {list(state)}")
    for module in vision, text, head:
        module.to(device).eval().requires_grad_(False)
    tokenize = make_tokenize(folders["tokenizer_config.json"], 35, device)

    def reward(images, prompts):
        image = vision(pixel_values=clip_pixels(images, BLIP_LARGE["image_size"])).last_hidden_state
        hidden = text(**tokenize(prompts), encoder_hidden_states=image, is_decoder=False).last_hidden_state[:, 0]
        return (head(hidden)[:, 0] - 0.16717362830052426) / 1.0333394966054072

    return reward

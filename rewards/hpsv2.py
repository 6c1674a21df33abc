"""HPSv2 (arXiv 2306.09341), 100 * cosine: about 23 to 28. A CLIP ViT-H/14 in open_clip's layout."""
from _original import load_original, renamed
from rsaft import clip_reward

FILES = {"HPS_v2_compressed.pt": "xswu/HPSv2",
         "tokenizer_config.json": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}

# Trap: the default hidden_act of CLIPConfig, quick_gelu, is wrong for it.
VIT_H = dict(text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                              num_attention_heads=16, hidden_act="gelu"),
             vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                                num_attention_heads=16, hidden_act="gelu", patch_size=14, image_size=224),
             projection_dim=1024)

OPEN_CLIP = (  # open_clip's names to those of transformers' CLIPModel
    (r"^visual\.", "vision_model."), (r"^(?!vision_model\.|logit_scale)", "text_model."),
    (r"^vision_model\.proj$", "visual_projection.weight"),
    (r"^text_model\.text_projection$", "text_projection.weight"),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.(token_embedding|class_embedding)", r".embeddings.\1"),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.ln_final\.", ".final_layer_norm."), (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.ln_([12])\.", r".layer_norm\1."), (r"\.transformer\.resblocks\.", ".encoder.layers."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."))


def make_vit_h(state, tokenizer_source):
    """A frozen CLIPModel of the shape VIT_H with these weights, under transformers' names, all of them."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    from transformers.initialization import no_init_weights
    config = CLIPConfig(**VIT_H)
    # Trap: the text is pooled at the first eos_token_id; with one that never occurs, silently at position 0.
    config.text_config.eos_token_id = AutoTokenizer.from_pretrained(tokenizer_source).eos_token_id
    with no_init_weights():    # all are loaded: random numbers for a billion weights would take seconds
        model = CLIPModel(config)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def load(folders, device):
    name, = [name for name in folders if name.endswith(".pt")]
    state = renamed(load_original(folders, name)["state_dict"], OPEN_CLIP)
    for key in [key for key in state if ".attn.in_proj_" in key]:
        for letter, part in zip("qkv", state.pop(key).chunk(3)):
            state[key.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")] = part
    for key in "visual_projection.weight", "text_projection.weight":
        state[key] = state[key].T.contiguous()
    model = make_vit_h(state, folders["tokenizer_config.json"])
    return clip_reward(model, folders["tokenizer_config.json"], device, 100.0, pad=True)

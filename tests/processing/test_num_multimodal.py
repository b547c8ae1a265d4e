"""How many tokens images take, as transformers' helper for other engines is asked."""

from PIL import Image

from fusion_hf import FusionProcessor, nano_path

SIZES = [(40, 30), (30, 40), (8, 8)]


def test_image_tokens_and_patches_are_those_of_a_call():
    processor = FusionProcessor.from_pretrained(nano_path())
    for grid in (None, 2):
        found = processor._get_num_multimodal_tokens(image_sizes=SIZES, image_token_grid=grid)
        for size, tokens, patches in zip(SIZES, found.num_image_tokens, found.num_image_patches, strict=True):
            image = Image.new("RGB", size[::-1])
            inputs = processor([image], "<image>\nwhat is it?", image_token_grid=grid, return_tensors="pt")
            assert (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == tokens
            assert len(inputs["pixel_values"]) == patches
    assert processor._get_num_multimodal_tokens().num_image_tokens is None

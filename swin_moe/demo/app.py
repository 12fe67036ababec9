"""The page: an image comes in; classes, experts, attention of the patch that is clicked, features."""

from typing import Any

from PIL import Image

from swin_moe.demo import draw
from swin_moe.demo.look import Looked, Observer, patch_at

Answer = tuple[dict[str, float], Image.Image | None, Image.Image | None, Image.Image, Looked]


def answer(observer: Observer, image: Image.Image | None, block: str) -> Answer | None:
    """Returns what the page shows of a new image; None of none."""
    if image is None:
        return None
    looked = observer.look(image)
    return dict(looked.classes), draw.experts(looked), clicked(observer, looked, block), draw.features(looked), looked


def clicked(
    observer: Observer, looked: Looked, block: str, place: tuple[float, float] = (0.5, 0.5)
) -> Image.Image | None:
    """Returns the picture of the attention of the patch at a place; None of a network without attention (Swin-MLP).

    place: Shares of the picture's width and height.
    """
    if block not in looked.blocks:
        return None
    row, column = patch_at(looked, block, *place)
    return draw.attention(looked, observer.attention_of(looked, block, row, column), row, column)


def build(observer: Observer, title: str) -> Any:
    """Returns the page, a gradio.Blocks; nothing in it asks another host."""
    import gradio as gr

    blocks = list(observer.attention)
    with gr.Blocks(title=f"swin-moe: {title}", analytics_enabled=False) as page:
        gr.Markdown(f"## {title}\nUpload an image. What is shown is what the network saw: resized and cropped.")
        seen = gr.State(None)
        with gr.Row():
            given = gr.Image(type="pil", label="image", height=320, sources=["upload", "clipboard"])
            classes = gr.Label(label="classes", num_top_classes=5)
        with gr.Tab("Experts"):
            without = "" if observer.recorder is not None else "This network has no layer where a patch has one expert."
            gr.Markdown(
                without or "Which expert took which patch, per MoE layer: colour and number; crossed out: dropped."
            )
            experts = gr.Image(label="experts", interactive=False)
        with gr.Tab("Attention"):
            gr.Markdown("Click a patch (framed): how much it takes of each other in its window, mean over heads.")
            block = gr.Dropdown(blocks, value=blocks[-1] if blocks else None, label="block")
            attention = gr.Image(label="attention", interactive=False, width=448)
        with gr.Tab("Features"):
            gr.Markdown("Length of the features at each position, by stage: dark the least, yellow the most.")
            features = gr.Image(label="features", interactive=False)
        shown = [classes, experts, attention, features, seen]

        def on_image(image: Image.Image | None, chosen: str) -> Any:
            return answer(observer, image, chosen) or (None,) * len(shown)

        def on_block(chosen: str, looked: Looked | None) -> Any:
            return None if looked is None else clicked(observer, looked, chosen)

        def on_click(chosen: str, looked: Looked | None, event: gr.SelectData) -> Any:
            if looked is None:
                return None
            height = round(draw.SIDE * looked.pixels.shape[0] / looked.pixels.shape[1])
            return clicked(observer, looked, chosen, (event.index[0] / draw.SIDE, event.index[1] / height))

        given.change(on_image, [given, block], shown)
        block.change(on_block, [block, seen], attention)
        attention.select(on_click, [block, seen], attention)
    return page

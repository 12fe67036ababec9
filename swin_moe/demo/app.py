"""The page: an image comes in; what the network says, experts, attention of the patch that is clicked, features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from swin_moe.demo import draw
from swin_moe.demo.look import Looked, Observer, patch_at

LOWEST = 0.3  # score of an object that is drawn at first, as in `swin-moe predict`
# Gradio lays a picture's buttons over its top, and shrinks what is wide until a phone's owner cannot read it: here the
# buttons stand above, and on a narrow page pictures keep their size, to be moved sideways within their frame.
_STYLE = """<style>
.picture .icon-button-wrapper {position: static; margin: 0 0 4px auto; width: fit-content}
@media (max-width: 700px) {
  .whole .image-container, .whole .image-frame {width: 100%; overflow-x: auto; display: block}
  .whole .image-frame img {width: auto !important; max-width: none !important; height: auto !important}
}
</style>"""


@dataclass(frozen=True)
class Answer:
    """What the page shows of an image."""

    said: dict[str, float] | Image.Image | None  # probability by class, or what was found, drawn
    experts: Image.Image | None
    attention: Image.Image | None
    features: Image.Image | None
    looked: Looked


def answer(observer: Observer, image: Image.Image | None, block: str, lowest: float = LOWEST) -> Answer | None:
    """Returns what the page shows of a new image; None of none."""
    if image is None:
        return None
    looked = observer.look(image)
    said = draw.found(looked, observer.network.names, lowest) if observer.network.finds else dict(looked.said.classes)
    return Answer(said, draw.experts(looked), clicked(observer, looked, block), draw.features(looked), looked)


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
    finds = observer.network.finds
    fitted = "resized and padded" if finds else "resized and cropped"
    with gr.Blocks(title=f"swin-moe: {title}", analytics_enabled=False) as page:
        gr.HTML(_STYLE, padding=False)
        gr.Markdown(f"## {title}\nUpload an image. What the tabs show is what the network saw: {fitted}.")
        seen = gr.State(None)
        with gr.Row():
            given = gr.Image(type="pil", label="image", height=320, sources=["upload", "clipboard"])
            with gr.Column():
                counted = gr.Markdown("found:", visible=finds)
                said = _picture(gr, "found") if finds else gr.Label(label="classes", num_top_classes=5)
                lowest = gr.Slider(0, 1, LOWEST, step=0.05, label="lowest score of an object", visible=finds)
        experts, block, attention, features = _tabs(gr, blocks, has_experts=observer.recorder is not None)
        shown = [counted, said, experts, attention, features, seen]

        def on_image(image: Image.Image | None, chosen: str, score: float) -> Sequence[Any]:
            found = answer(observer, image, chosen, score)
            if found is None:
                return (None,) * len(shown)
            text = draw.count(found.looked, score) if finds else ""
            return text, found.said, found.experts, found.attention, found.features, found.looked

        def on_block(chosen: str, looked: Looked | None) -> Any:
            return None if looked is None else clicked(observer, looked, chosen)

        def on_score(score: float, looked: Looked | None) -> Sequence[Any]:
            if looked is None:
                return None, None
            return draw.count(looked, score), draw.found(looked, observer.network.names, score)

        def on_click(chosen: str, looked: Looked | None, event: gr.SelectData) -> Any:
            if looked is None:
                return None
            height = round(draw.SIDE * looked.pixels.shape[0] / looked.pixels.shape[1])
            return clicked(observer, looked, chosen, (event.index[0] / draw.SIDE, event.index[1] / height))

        given.change(on_image, [given, block, lowest], shown)
        block.change(on_block, [block, seen], attention)
        attention.select(on_click, [block, seen], attention)
        if finds:
            lowest.release(on_score, [lowest, seen], [counted, said])
    return page


def _picture(gr: Any, name: str, **options: Any) -> Any:
    """Returns the component of a picture that nothing is laid over, and that nothing sends to another host."""
    plain = {"show_label": False, "interactive": False, "buttons": ["download", "fullscreen"]}
    return gr.Image(**{**plain, "elem_id": name, "alt_text": name, "elem_classes": ["picture"], **options})


def _tabs(gr: Any, blocks: Sequence[str], *, has_experts: bool) -> tuple[Any, Any, Any, Any]:
    """Returns the components of the tabs: experts, the block that is chosen, attention, features."""
    with gr.Tab("Experts"):
        gr.Markdown(
            "Which expert took which patch, per MoE layer: colour and number; crossed out: dropped."
            if has_experts
            else "This network has no layer where a patch has one expert."
        )
        experts = _picture(gr, "experts", visible=has_experts, elem_classes=["picture", "whole"])
    with gr.Tab("Attention"):
        gr.Markdown("Click a patch (framed): how much it takes of each other in its window, mean over heads.")
        block = gr.Dropdown(blocks, value=blocks[-1] if blocks else None, label="block")
        attention = _picture(gr, "attention", width=draw.SIDE)
    with gr.Tab("Features"):
        gr.Markdown("Length of the features at each position, by stage: dark the least, yellow the most.")
        features = _picture(gr, "features", elem_classes=["picture", "whole"])
    return experts, block, attention, features

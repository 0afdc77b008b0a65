"""``report.html``: one page that needs nothing but itself."""

from __future__ import annotations

from html import escape
from string import Template

from gradacc.demo import plots
from gradacc.demo.proof import Measured, Proof, mebibytes
from gradacc.demo.record import Record
from gradacc.demo.sample import TEMPERATURE, Sample

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gradacc demo: report</title>
<style>
:root { color-scheme: light; --exact: #0b6e99; --naive: #c2571a; --muted: #5c626b; --line: #e1e3e7; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2025; background: #fff; margin: 0 auto; padding: 2rem 1.25rem;
  max-width: 62rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p { margin: .5rem 0; max-width: 48rem; } .muted, figcaption { color: var(--muted); font-size: .875rem; }
.note { border-left: 4px solid var(--naive); padding: .4rem .9rem; background: #fdf4ee; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; margin: 1.5rem 0; }
.fact { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; }
.fact b { display: block; font-size: 1.5rem; line-height: 1.3; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; } th.left, td.left { text-align: left; overflow-wrap: anywhere; }
.exact { color: var(--exact); } .naive { color: var(--naive); }
.wide { overflow-x: auto; } .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; }
pre { background: #f6f7f9; border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { color: var(--exact); }
</style>
</head>
<body>
<h1>Gradient accumulation, exact</h1>
<p>$intro</p>
$note
$facts
$sections
</body>
</html>
""")


def render(record: Record) -> str:
    """The page for what was reached, however little that is."""
    parts = [_proof(record.proof)] if record.proof and record.proof.rows else []
    parts += [_training(record)] if record.history else []
    parts += [_samples(record.samples)] if record.samples else []
    return PAGE.substitute(
        intro=_intro(record),
        note=f'<p class="note">{escape(record.note)}</p>' if record.note else "",
        facts=_facts(record),
        sections="\n".join([*parts, _settings(record)]),
    )


def _intro(record: Record) -> str:
    """What this page can say: of gradients that were computed, and compared, alone."""
    text = f"A byte-level GPT and <code>gradacc demo</code>, on {escape(record.corpus or 'real text')}."
    if record.history:
        micro_batches = min(record.settings.steps, record.settings.batch_size)
        text += f" Every gradient was accumulated over {micro_batches} micro-batches."
    if record.proof and record.proof.rows:
        text += " The first batch's was compared with the large batch's."
    return text


def _facts(record: Record) -> str:
    facts: dict[str, str] = {}
    if record.proof and record.proof.rows:
        rows = record.proof.rows
        exact, naive = (max(getattr(row, way).gradient_error for row in rows) for way in ("exact", "naive"))
        facts[f"{exact:.0e}"] = f"largest relative difference from the large batch's gradient (usual loop: {naive:.1%})"
        peaks = f"{mebibytes(record.proof.peak)} → {mebibytes(rows[-1].exact.peak)} MiB"
        facts[peaks] = f"peak memory of a gradient: the large batch, and {rows[-1].steps} steps"
    if len(record.held_out) > 1:
        (_, before), *_, (iteration, after) = record.held_out
        facts[f"{before:.2f} → {after:.2f}"] = (
            f"bits per byte of held-out text, before and after {iteration} iterations"
        )
    cards = "".join(f'<div class="fact"><b>{escape(value)}</b>{escape(text)}</div>' for value, text in facts.items())
    return f'<div class="facts">{cards}</div>' if cards else ""


def _proof(proof: Proof) -> str:
    def cells(measured: Measured) -> str:
        values = (f"{measured.gradient_error:.1e}", f"{measured.loss_error:.1e}", mebibytes(measured.peak))
        return "".join(f"<td>{value}</td>" for value in values)

    rows = "".join(
        f'<tr><td>{row.steps}</td><td class="left">{_sizes(row.sizes)}</td>{cells(row.exact)}{cells(row.naive)}</tr>'
        for row in proof.rows
    )
    return f"""<h2>The promise, on this model and its first batch</h2>
<p>The large batch has {proof.shape[0]} pieces of text of different lengths, {proof.tokens} bytes to predict, padded to
{proof.shape[1]}; its loss is {proof.loss:.4f} nats per byte. Its gradient is taken from
<code>torch.func.grad_and_value</code> on the whole batch at once; one <code>.backward()</code> over the whole batch has a
peak memory of {mebibytes(proof.peak)} MiB.</p>
<div class="wide"><table>
<thead>
<tr><th></th><th></th><th colspan="3" class="exact">gradacc</th><th colspan="3" class="naive">mean of means</th></tr>
<tr><th>steps</th><th class="left">pieces each</th><th>gradient</th><th>loss</th><th>MiB</th><th>gradient</th>
<th>loss</th><th>MiB</th></tr>
</thead>
<tbody>{rows}</tbody>
</table></div>
<p class="muted">gradient: ‖g &minus; g*‖ / ‖g*‖ over all parameters together, where g* is the large batch's; loss: the same
for its value. The mean of means is the usual loop, <code>(loss / steps).backward()</code>: it gives every micro-batch the
same weight, however few bytes it holds, which is wrong as soon as lengths differ. MiB: the most bytes of tensors held
at one time over those held before the call (parameters not included, the gradient included).</p>
<div class="pair">
<figure>{plots.error_plot(proof)}<figcaption>Error against steps (logarithmic; what is exactly zero is drawn at the
bottom).</figcaption></figure>
<figure>{plots.memory_plot(proof)}<figcaption>Peak memory against steps.</figcaption></figure>
</div>"""


def _sizes(sizes: tuple[int, ...]) -> str:
    """How many micro-batches of which size, in HTML.

    >>> _sizes((6, 5, 5))
    '1 &times; 6 + 2 &times; 5'
    """
    return " + ".join(f"{sizes.count(size)} &times; {size}" for size in sorted(set(sizes), reverse=True))


def _training(record: Record) -> str:
    history = record.history
    tokens, seconds = sum(metrics.tokens for metrics in history), sum(metrics.seconds for metrics in history)
    return f"""<h2>Training</h2>
<p>{len(history)} iterations on {tokens:,} bytes in {seconds:.0f} s: {tokens / seconds:,.0f} bytes predicted per second,
padding not counted.</p>
<figure>{plots.loss_plot(history, record.held_out)}<figcaption>Bits per byte (loss in nats / ln 2) against iterations; a
uniform guess would need 8. The held-out text is from other documents than those trained on.</figcaption></figure>"""


def _samples(samples: list[Sample]) -> str:
    texts = "".join(f"<pre><b>{escape(sample.prompt)}</b>{escape(sample.text)}</pre>" for sample in samples)
    return f"""<h2>What it writes</h2>
<p class="muted">In colour what was given, the first bytes of a held-out piece; the rest was drawn byte by byte at
temperature {TEMPERATURE}. After so little training it has learned how such text looks, not what it means.</p>
{texts}"""


def _settings(record: Record) -> str:
    settings = record.settings
    values = {
        "text": record.corpus,
        "model": describe_model(record),
        "optimizer": "AdamW, linear warm-up, cosine decay, gradients clipped to norm 1",
        "--steps": settings.steps,
        "--batch-size": settings.batch_size,
        "--iterations": settings.iterations,
        "--lr": settings.lr,
        "--seed": settings.seed,
        "machine": record.machine,
    }
    rows = "".join(
        f'<tr><th class="left">{name}</th><td class="left">{escape(str(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<h2>Settings</h2>\n<div class="wide"><table><tbody>{rows}</tbody></table></div>'


def describe_model(record: Record) -> str:
    """The model's sizes in words."""
    layers, heads, width, context, _ = record.settings.model
    parameters = f"{record.parameters:,} parameters"
    return f"GPT, {parameters}, {layers} layers, {heads} heads, width {width}, context {context} bytes"

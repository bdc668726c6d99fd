"""3. Bayes: what a positive test says about a rare condition, and what a rare class does to scores of a classifier."""

import marimo

app = marimo.App(width="medium", css_file="page.css", app_title="Bayes")

with app.setup:
    import altair as alt
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.explore import _page as page
    from jprob import bayes, metrics

    SCORES = ("accuracy", "balanced accuracy", "precision", "recall", "F1")
    RATES = np.geomspace(0.1, 50, 60).astype(np.float32)


@app.cell(hide_code=True)
def _():
    page.intro(
        "Bayes",
        "A test is right about most of the ill and most of the healthy. If few people are ill, most positive results "
        "still come from healthy people. Accuracy does not see that, and precision does.",
        r"P(\mathrm{ill} \mid +) = \frac{P(+ \mid \mathrm{ill}) \, P(\mathrm{ill})}{P(+)}",
    )
    return


@app.function
@jax.jit
def measure(prior, positive, negative):
    """Posteriors in percent; the scores of the test as a classifier, here and for every prior."""
    log_prior = jnp.log(prior)

    def scores(prior):
        matrix = 1000 * prior[::-1, None] * jnp.stack([negative, positive], axis=1)[::-1]
        yes = (score(matrix)[1] for score in (metrics.precision, metrics.recall, metrics.f1_score))
        return jnp.stack([metrics.accuracy(matrix), metrics.balanced_accuracy(matrix), *yes]), matrix

    here, matrix = scores(prior)
    rates = jnp.array(RATES) / 100
    return {
        "posterior": 100 * jnp.exp(bayes.log_posterior(log_prior, jnp.log(positive)))[0],
        "evidence": 100 * jnp.exp(bayes.log_evidence(log_prior, jnp.log(positive))),
        "missed": 100 * jnp.exp(bayes.log_posterior(log_prior, jnp.log(negative)))[0],
        "always_no": prior[1],
        "scores": here,
        "counts": matrix.ravel(),
    }, jax.vmap(lambda rate: scores(jnp.stack([rate, 1 - rate]))[0])(rates)


@app.function
def shares(values):
    """The prior, and the likelihoods of a positive and a negative result, each for the ill and the healthy."""
    prior, ill, healthy = (float(values[name]) for name in ("prior, %", "sensitivity, %", "specificity, %"))
    pairs = (prior, 100 - prior), (ill, 100 - healthy), (100 - ill, healthy)
    return [[round(share / 100, 4) for share in pair] for pair in pairs]


@app.function
def compute(values):
    """All that the page shows, by name."""
    found, curves = jax.device_get(measure(*np.array(shares(values), np.float32)))
    return page.flat(found) | {"curves": curves}


@app.function
def code(values):
    """The same by plain jprob."""
    prior, positive, negative = shares(values)
    return f"""
import jax.numpy as jnp
from jprob import bayes, metrics

prior = jnp.array({prior})  # ill, healthy
positive, negative = jnp.array({positive}), jnp.array({negative})
posterior = 100 * jnp.exp(bayes.log_posterior(jnp.log(prior), jnp.log(positive)))[0]
evidence = 100 * jnp.exp(bayes.log_evidence(jnp.log(prior), jnp.log(positive)))
missed = 100 * jnp.exp(bayes.log_posterior(jnp.log(prior), jnp.log(negative)))[0]

healthy, ill = [1000 * prior[k] * jnp.stack([negative[k], positive[k]]) for k in (1, 0)]
matrix = jnp.stack([healthy, ill])  # rows: the truth; columns: what the test says
scores = [metrics.accuracy(matrix), metrics.balanced_accuracy(matrix)]
scores += [score(matrix)[1] for score in (metrics.precision, metrics.recall, metrics.f1_score)]
"""


@app.cell(hide_code=True)
def _():
    controls = page.controls(
        **{
            "prior,_%": (0.1, 50, 0.1, 1),
            "sensitivity,_%": (50, 100, 0.1, 99),
            "specificity,_%": (50, 100, 0.1, 95),
        }
    )
    page.panel(controls)
    return (controls,)


@app.function
def areas(found):
    """All positive results as one bar: the true ones and the false ones."""
    names = ["ill", "healthy"]
    data = page.rows(who=names, people=[found["counts_3"], found["counts_1"]], order=[0, 1])
    colour = alt.Color("who:N", sort=names, scale=alt.Scale(domain=names, range=[page.RED, page.SKY]))
    bar = (
        alt.Chart(data)
        .mark_bar()
        .encode(
            x=alt.X("people:Q", title="share of the positive results", stack="normalize", axis=alt.Axis(format="%")),
            color=colour,
            order="order:O",
        )
    )
    return page.chart([bar], "Who has a positive result: the red area is the posterior", height=70)


@app.function
def square(found, prior):
    """1000 people as a square: its width is split by the prior, and each part by the result."""
    healthy_no, healthy_yes, ill_no, ill_yes = (float(found[f"counts_{k}"]) for k in range(4))
    ill, healthy = ill_yes / (ill_yes + ill_no), healthy_yes / (healthy_yes + healthy_no)
    names = ["ill, positive", "ill, negative", "healthy, positive", "healthy, negative"]
    data = page.rows(
        who=[name.replace(",", ":") for name in names],
        x=[0, 0, prior, prior],
        x2=[prior, prior, 1, 1],
        y=[0, ill, 0, healthy],
        y2=[ill, 1, healthy, 1],
    )
    names = [name.replace(",", ":") for name in names]
    colours = alt.Scale(domain=names, range=[page.RED, page.GOLD, page.SKY, page.GREY])
    rect = (
        alt.Chart(data)
        .mark_rect(opacity=0.9)
        .encode(
            x=alt.X("x:Q", title="share of people", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
            x2="x2:Q",
            y=alt.Y("y:Q", title="share of results", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
            y2="y2:Q",
            color=alt.Color("who:N", sort=names, scale=colours),
        )
    )
    return page.chart([rect], "All people: each area is a probability")


@app.function
def curves(found, prior):
    """Scores of the same test as the class gets rarer."""
    data = page.rows(
        rate=np.repeat(RATES, len(SCORES)), score=np.tile(SCORES, RATES.size), value=found["curves"].ravel()
    )
    x = alt.X("rate:Q", title="share of the ill, %", scale=alt.Scale(type="log", nice=False))
    line = (
        alt.Chart(data)
        .mark_line()
        .encode(
            x=x,
            y=alt.Y("value:Q", title="score", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("score:N", sort=list(SCORES), scale=page.COLOURED),
        )
    )
    rule = alt.Chart(page.rows(rate=[100 * prior])).mark_rule(color=page.GREY, strokeDash=[4, 4]).encode(x=x)
    return page.chart([line, rule], "The same test among fewer ill people")


@app.cell(hide_code=True)
def _(controls):
    found = compute(controls.value)
    page.show(
        page.numbers(
            {
                "posterior": "ill if positive, %",
                "missed": "ill if negative, %",
                "evidence": "positive results, %",
            }
            | {f"scores_{k}": name for k, name in enumerate(SCORES)}
            | {"always_no": "accuracy of always saying no"},
            found,
        )
    )
    return (found,)


@app.cell(hide_code=True)
def _(controls, found):
    prior = shares(controls.value)[0][0]
    page.show(
        areas(found) + square(found, prior),
        curves(found, prior),
        "<p>Expected counts among 1000 people</p>"
        + page.table(
            ["", "negative", "positive"],
            [
                [who, *(page.output(f"counts_{k}", found[f"counts_{k}"]) for k in places)]
                for who, places in {"healthy": (0, 1), "ill": (2, 3)}.items()
            ],
        ),
    )
    return


@app.cell(hide_code=True)
def _(controls):
    page.code(code(controls.value))
    return


if __name__ == "__main__":
    app.run()

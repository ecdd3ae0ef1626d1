# %% [markdown]
# # The derivation of the ELBO, executable
#
# Every line of the proof is computed on the same sampled paths. Lines 1 to 5 are rearrangements: they give the same
# number on *each path*. Lines 6 to 8 take expectations: they give the same number *on average*. Both are asserted.
#
# Sources: Sohl-Dickstein et al. (2015), arXiv:1503.03585 [S], and Ho et al. (2020), arXiv:2006.11239 [H].
# The notation is that of docs/theory.md: x_0 is the datum, z_1 … z_N the latents, q the noising chain, p the model.

# %%
import argparse

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from matplotlib.figure import Figure
from numpyro import handlers
from numpyro.distributions import kl_divergence
from numpyro.infer.util import log_density

import probdiff
from probdiff.oracles import GaussianOracle, exact_log_prob, exact_terms

parser = argparse.ArgumentParser(description="The derivation of the ELBO, executable")
parser.add_argument("--quick", action="store_true", help="few paths, to see that it runs")
PATHS = 500 if parser.parse_args().quick else 20_000
Z_MAX = 4.9  # standard errors
numpyro.enable_x64()

# %% [markdown]
# ## The model
#
# The data are Gaussian and the network is linear, so that every expectation is known exactly. The network is the exact
# one times 0.9: a wrong model, in which nothing cancels by chance. N is small, and the chain ends before all signal is
# gone, so that no term is negligible, not even the prior KL.

# %%
N = 8
oracle = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
schedule = probdiff.log_snr_schedule(N, log_snr_max=4.0, log_snr_min=-1.0)
diffusion = probdiff.Diffusion(schedule, oracle.network(schedule, scale=0.9))
x = jnp.asarray(oracle.sample(np.random.default_rng(0), 5))

x0 = jnp.tile(x, (PATHS, 1))  # rows (path, datum); with this likelihood x_0 is x
paths = handlers.trace(handlers.seed(diffusion.guide, 1)).get_trace(x0)["z"]
z = [x0, *paths["value"][::-1]]  # the site has z_N first; here z[n] is z_n

# %% [markdown]
# ## 1. The closed-form marginal
#
# One step is z_n = √α_n z_{n−1} + √β_n ε. If z_{n−1} = a x_0 + √v ε', then z_n = √α_n a x_0 + noise of variance
# α_n v + β_n, as independent Gaussians add. From a = 1, v = 0 this recursion gives √ᾱ_n and 1 − ᾱ_n [H, eq. 4].
# On the sampled chain, a is the slope of z_n on x_0, and v the variance around it.

# %%
print(f"{'':16}coefficient of x_0 in the mean of z_n{'':24}variance of z_n")
print(" n" + "".join(f"{'recursion':>12}{name:>9}{'sampled ± s.e.':>19}{'z':>6}" for name in ("√ᾱ_n", "1−ᾱ_n")))
a, v = 1.0, 0.0
for n in range(1, N + 1):
    a, v = np.sqrt(schedule.alpha[n - 1]) * a, schedule.alpha[n - 1] * v + schedule.beta[n - 1]
    formula = np.sqrt(schedule.alpha_bar[n - 1]), 1 - schedule.alpha_bar[n - 1]
    np.testing.assert_allclose((a, v), formula, rtol=1e-12)
    slope = (z[n] * x0).sum() / (x0**2).sum()
    variance = ((z[n] - slope * x0) ** 2).sum() / (x0.size - 1)
    error = np.sqrt(variance / (x0**2).sum()), variance * np.sqrt(2 / (x0.size - 1))
    row = f"{n:2}"
    for recursion, closed, sampled, se in zip((a, v), formula, (slope, variance), error):
        assert abs(sampled - closed) <= Z_MAX * se, f"n = {n}: {sampled} ± {se} in the chain, {closed} in closed form"
        row += f"{recursion:12.5f}{closed:9.5f}{sampled:10.5f} ± {se:.4f}{(sampled - closed) / se:6.1f}"
    print(row)

# %% [markdown]
# ## 2. The key step: Bayes' rule is a change of guide
#
# `guide` draws z_1, then z_n given z_{n−1}. `posterior_guide` draws z_N, then z_{n−1} given z_n and x_0: the same
# distribution, factorised in the model's order. Both give a path the same density: *changing the guide is the line
# "apply Bayes' rule" of the proof*. (The forward guide refuses given values: its density is read from its trace.)

# %%
path = handlers.trace(handlers.seed(diffusion.guide, 0)).get_trace(x[:1])["z"]
log_q_forward = path["fn"].log_prob(path["value"]).sum()
log_q_bayes, _ = log_density(handlers.substitute(diffusion.posterior_guide, {"z": path["value"]}), (x[:1],), {}, {})
log_p, _ = log_density(handlers.substitute(diffusion.model, {"z": path["value"]}), (x[:1],), {}, {})
np.testing.assert_allclose(log_q_bayes, log_q_forward, rtol=1e-9)

print(f"\nOne path\nlog q(z | x_0), forward guide    {log_q_forward:18.12f} nats")
print(f"log q(z | x_0), posterior guide  {log_q_bayes:18.12f} nats")
print(f"log p(x, z) − log q(z | x_0)     {log_p - log_q_bayes:18.12f} nats")

# %% [markdown]
# ## 3. Lines 1 to 5: the same number on each path
#
# **Line 0**: p(x) = E_q[p(x, z) / q(z | x_0)] [S, eq. 9]. The logarithm is concave, so by Jensen's inequality
# log p(x) ≥ E_q[log p(x, z) − log q(z | x_0)], the ELBO [S, eq. 12; H, eq. 3]. What follows rewrites the inside of
# that expectation [H, appendix A].
#
# 1. Both chains written as products over their steps.
# 2. Step n of q matched with step n of p; for n = 1 the partner is the likelihood [H, eq. 19].
# 3. Bayes' rule for n ≥ 2: q(z_n | z_{n−1}) = q(z_{n−1} | z_n, x_0) q(z_n | x_0) / q(z_{n−1} | x_0). It may be used
#    because the chain is Markov: given z_{n−1}, z_n does not depend on x_0 [S, eqs. 47 and 48; H, eq. 20].
# 4. The marginals telescope: Σ [log q(z_n | x_0) − log q(z_{n−1} | x_0)] leaves n = N and n = 1, and the latter
#    cancels the unmatched q(z_1 | x_0) [H, eq. 21].
# 5. Regrouped: minus a log-ratio for z_N, minus one for each step, plus the log-likelihood.

# %%
steps = range(2, N + 1)
p_N = dist.Normal(jnp.zeros_like(x0), 1.0).to_event(1)
q_N = probdiff.forward_marginal(schedule, x0, N)
q_bayes = {n: probdiff.forward_posterior(schedule, z[n], x0, n) for n in steps}


def log_densities(diffusion):
    """On the paths: log p(z_N); by step, log p(z_{n−1} | z_n) (at n = 1 the likelihood) and log q(z_n | z_{n−1})."""
    p = {n: diffusion.reverse_kernel(z[n], n).log_prob(z[n - 1]) for n in (1, *steps)}
    q = {n: probdiff.forward_step(schedule, z[n - 1], n).log_prob(z[n]) for n in (1, *steps)}
    return p_N.log_prob(z[N]), p, q


prior, p, q = log_densities(diffusion)
bayes = {n: q_bayes[n].log_prob(z[n - 1]) for n in steps}
marginal = {n: probdiff.forward_marginal(schedule, x0, n).log_prob(z[n]) for n in (1, *steps)}
terms_5 = np.array([-(marginal[N] - prior), *(-(bayes[n] - p[n]) for n in steps), p[1]])

line_1 = prior + sum(p.values()) - sum(q.values())
lines = {
    "1 products over steps": line_1,
    "2 steps matched": prior + p[1] - q[1] + sum(p[n] - q[n] for n in steps),
    "3 after Bayes' rule": prior + p[1] - q[1] + sum(p[n] - (bayes[n] + marginal[n] - marginal[n - 1]) for n in steps),
    "4 telescoped": prior + p[1] - marginal[N] + sum(p[n] - bayes[n] for n in steps),
    "5 regrouped": terms_5.sum(0),
}
log_p, _ = log_density(handlers.substitute(diffusion.model, {"z": paths["value"]}), (x0,), {}, {})
np.testing.assert_allclose(line_1.sum(), log_p - paths["fn"].log_prob(paths["value"]).sum(), rtol=1e-9)

print(f"\n{len(x)} data, {PATHS} paths each: mean, and largest difference from line 1 on any path, nats")
for name, value in lines.items():
    np.testing.assert_allclose(value, line_1, rtol=1e-9, atol=1e-9, err_msg=name)
    print(f"{name:24}{value.mean():10.5f}{np.abs(value - line_1).max():12.1e}")

# %% [markdown]
# ## 4. Lines 6 to 8: the same number on average
#
# 6. Each log-ratio is replaced by its expectation given the sites that the posterior guide draws before it: z_n for
#    step n, none for z_N (x_0 is given throughout). These are KLs in closed form [S, eq. 14; H, eqs. 5 and 22]. As the
#    variances are fixed, the KL of a step is a weighted squared error of the predicted noise, plus a constant
#    [H, eq. 12]. `elbo_terms` computes it in this form, and on the noise of these paths it must give line 6 again.
# 7. The KL of a step depends on z_n alone, so that its expectation needs only q(z_n | x_0): each step may draw its
#    own z_n.
# 8. The expectation itself. Lines 5 to 7 are compared with it term by term, datum by datum.
#
# As estimators these lines are `Trace_ELBO` (lines 1 to 5), `TraceMeanField_ELBO` with the posterior guide (line 6),
# and `elbo_terms` and `AnalyticELBO` (line 7).
#
# In line 6 samples are replaced by expectations. The variance of *each term* cannot rise (Rao-Blackwell): see the last
# column. The variance of the *sum* can. Compare the last two columns: in line 5 the terms are negatively correlated and
# partly cancel; in line 6 they are positively correlated, as neighbouring z_n are similar and so are their KLs; in line
# 7 they are independent.


# %%
def kl_terms(diffusion):
    """The terms of line 6 on the same paths, shape (term, row)."""
    kl = [kl_divergence(q_bayes[n], diffusion.reverse_kernel(z[n], n)) for n in steps]
    return np.array([-kl_divergence(q_N, p_N), *(-k for k in kl), diffusion.reverse_kernel(z[1], 1).log_prob(x0)])


def stacked(prior_kl, step_kl, reconstruction):
    """The terms of line 7 (the term as the first axis) or of line 8 as one array, in the order of line 6."""
    return np.concatenate([-prior_kl[None], -step_kl, reconstruction[None]])


def summarise(name, terms, exact):
    """Check every term of every datum; print mean and variance over paths; return the values, shape (path, datum)."""
    terms = terms.reshape(N + 1, PATHS, len(x))
    value, variances = terms.sum(0), terms.var(1, ddof=1)
    error = np.abs(terms.mean(1) - exact)
    assert np.all(error <= Z_MAX * np.sqrt(variances / PATHS) + 1e-9), f"line {name}, by term and datum:\n{error}"
    variance = value.var(0, ddof=1).mean()
    se = np.sqrt(variance / value.size)
    score = (value.mean() - exact.sum(0).mean()) / se
    assert abs(score) <= Z_MAX, f"line {name}: z = {score}"
    print(f"{name:24}{value.mean():10.5f} ± {se:.5f}{score:7.1f}{variance:12.4f}{variances.sum(0).mean():18.4f}")
    return value


terms_6 = kl_terms(diffusion)
noise = [(z[n] - np.sqrt(schedule.alpha_bar[n - 1]) * x0) / np.sqrt(1 - schedule.alpha_bar[n - 1]) for n in (1, *steps)]
noise = np.reshape(noise, (N, PATHS, *x.shape)).swapaxes(0, 1)
by_noise = probdiff.elbo_terms(diffusion, x, noise=noise).elbo
np.testing.assert_allclose(terms_6.sum(0), by_noise.ravel(), rtol=1e-9, atol=1e-9)

own = probdiff.elbo_terms(diffusion, x, key=jax.random.key(2), num_draws=PATHS)
terms_7 = stacked(np.tile(own.prior_kl, (PATHS, 1)), own.step_kl.swapaxes(0, 1), own.reconstruction)
exact = exact_terms(diffusion, x)
line_8, log_p_x = exact.pop("elbo"), exact_log_prob(diffusion, x)
terms_8 = stacked(**exact)

header = f"{'line':24}{'mean':>10}{'s.e.':>10}{'z':>7}{'variance':>12}{'Σ of its terms':>18}"
print(f"\nMean ± s.e., nats; z against line 8; variance over paths, and that of the terms, summed\n{header}")
line_5 = summarise("5 log-ratios on paths", terms_5, terms_8)
line_6 = summarise("6 KLs, same paths", terms_6, terms_8)
line_7 = summarise("7 KLs, independent z_n", terms_7, terms_8)
print(f"{'8 exact':24}{line_8.mean():10.5f}\n{'0 log p(x), exact':24}{log_p_x.mean():10.5f}", end="")
weight = np.exp(line_5 - log_p_x)
se = np.sqrt(weight.var(0, ddof=1).mean() / weight.size)
assert abs(weight.mean() - 1) <= Z_MAX * se, f"line 0: {weight.mean()} ± {se}"
print(f"   E_q[p(x, z) / q(z | x_0)] / p(x) = {weight.mean():.4f} ± {se:.4f}")

# %% [markdown]
# ## 5. Where log-ratios on a path have less variance than KLs
#
# Data N(0, I), the exact network and v_n = β_n: the chain is stationary and p is its exact reversal, so that
# q(z | x_0) = p(z | x). Then log p(x, z) − log q(z | x_0) is log p(x), whatever the path: the bound is tight and a
# single path gives it [S, sections 2.3 and 2.4]. The KLs of line 6 are not zero, as q(z_{n−1} | z_n, x_0) depends on
# x_0 and p does not. The KLs vary with z_n. On every path the variations of the log-ratios cancel; those of the KLs do
# not.

# %%
network = GaussianOracle([0.0, 0.0], np.eye(2)).network(schedule)
stationary = probdiff.Diffusion(schedule, network, reverse_variance="forward")
prior, p, q = log_densities(stationary)
value = np.reshape(prior + sum(p.values()) - sum(q.values()), (PATHS, len(x)))
exact, log_p_stationary = exact_terms(stationary, x), exact_log_prob(stationary, x)
np.testing.assert_allclose(exact.pop("elbo"), log_p_stationary, rtol=1e-9)
np.testing.assert_allclose(value, np.tile(log_p_stationary, (PATHS, 1)), rtol=1e-9)
print(f"\nThe reverse steps are exact: data N(0, I), v_n = β_n\n{header}")
print(f"{'1 to 5':24}{value.mean():10.5f}   on every path{value.var(0, ddof=1).mean():15.1e}")
summarise("6 KLs, same paths", kl_terms(stationary), stacked(**exact))
print(f"{'8 exact, and log p(x)':24}{log_p_stationary.mean():10.5f}")

# %% [markdown]
# ## 6. The figure, for the first datum
#
# Left, 300 paths: line 5 is on the diagonal, line 6 is not. Right, all paths: the lines have the same mean and
# different spreads (the lowest half per cent of line 6 is cut off).

# %%
figure = Figure(figsize=(9, 4.4), dpi=130, layout="constrained")
left, right = figure.subplots(1, 2)
shown = line_1.reshape(PATHS, len(x))[:300, 0]
left.scatter(shown, line_6[:300, 0], s=9, color="C1", alpha=0.6, lw=0, label="line 6: KLs on the same path")
left.scatter(shown, line_5[:300, 0], s=9, color="C0", lw=0, label="line 5: equal to line 1")
left.set(xlabel="line 1: log p(x, z) − log q(z | x$_0$), nats", ylabel="line 5 and line 6 on that path, nats")

values = {"lines 1–5\npaths": line_5, "line 6\nKLs, same paths": line_6, "line 7\nKLs, own noise": line_7}
values = {f"{name}\nvariance {value[:, 0].var(ddof=1):.2f}": value[:, 0] for name, value in values.items()}
violins = right.violinplot(list(values.values()), showextrema=False, widths=0.8)
for body, color in zip(violins["bodies"], ("C0", "C1", "C2")):
    body.set(color=color, alpha=0.4)
mean, se = zip(*((value.mean(), value.std(ddof=1) / np.sqrt(PATHS)) for value in values.values()))
right.errorbar((1, 2, 3), mean, 2 * np.array(se), fmt="ko", ms=3, capsize=5, label="mean ± 2 s.e.")
right.axhline(line_8[0], color="k", lw=1, label="line 8, exact")
right.axhline(log_p_x[0], color="k", lw=1, ls=":", label="log p(x)")
right.set_xticks((1, 2, 3), values)
right.set(ylabel="value on a path, nats", ylim=(np.quantile(line_6[:, 0], 0.005), line_5[:, 0].max() + 0.5))
for axes in (left, right):
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.0, fontsize="small", frameon=False
    )
figure.savefig("elbo_derivation.png")
print("\nfigure: elbo_derivation.png")

# %% [markdown]
# # Do the tests notice a bug?
#
# Each entry of the tables below is a bug that somebody could make (several have been published), with the tests that
# must catch it. The bugs are put into a copy of the package one at a time; the named tests, which pass without the bug,
# must then fail.
#
# A bug is in a function, which is found by its name in any module. The expression or the statements that the bug changes
# are found by their syntax tree, so that nothing here depends on files, formatting or comments.

# %%
import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

parser = argparse.ArgumentParser(description="Do the tests notice a bug?")
parser.add_argument("--quick", action="store_true", help="two bugs, to see that it runs")
parser.add_argument("--check", action="store_true", help="only find the place of every bug, and its tests")
parser.add_argument("--only", nargs="+", metavar="WORDS", help="the bugs whose description has any of these in it")
arguments = parser.parse_args()

ROOT = Path(__file__).parent.parent


# %%
class Bug(NamedTuple):
    """A bug: its description; its function, ``name`` or ``Class.name``; the right code; the wrong code; the names of its test files."""

    words: str
    function: str
    right: str
    wrong: str
    tests: str


# %%
MATHEMATICS = [
    ("β̃ with ᾱ of the same step", "NoiseSchedule.__init__",
     "noise[:-1]",
     "noise[1:]", "schedules properties"),
    ("ᾱ instead of √ᾱ in the marginal", "forward_marginal",
     "jnp.sqrt(alpha_bar)[..., None] * x0",
     "alpha_bar[..., None] * x0", "forward"),
    ("v_1 is β̃_1", "GaussianKernel.variance",
     "beta[:1]",
     "posterior[:1]", "closed_form"),
    ("½ missing in the step KL", "GaussianKernel.kl_weight",
     "2 * schedule.alpha",
     "schedule.alpha", "closed_form"),
    ("log-variance missing in the step KL", "GaussianKernel.constant",
     "xp.expm1(-later) + later",
     "xp.expm1(-later)", "closed_form"),
    ("the prior KL dropped", "ELBOTerms.elbo",
     "self.reconstruction - self.step_kl.sum(1) - self.prior_kl",
     "self.reconstruction - self.step_kl.sum(1)", "closed_form"),
    ("the mean over the dimensions instead of the sum", "weighted_error",
     "(at_dims(weight, n, eps_hat.dtype) * squared).sum(-1)",
     "(at_dims(weight, n, eps_hat.dtype) * squared).mean(-1)", "estimators"),
    ("the forward guide in ascending order", "guide",
     "scan(step, x0, _descending_steps(schedule), reverse=True)",
     "scan(step, x0, _descending_steps(schedule)[::-1])", "scan"),
    ("σ instead of σ² in the noising", "noising",
     "jnp.square(_at(schedule, _sigma, n, x0))",
     "_at(schedule, _sigma, n, x0)", "score"),
    ("the network is given x_n instead of z_n", "score",
     "vp_from_ve(diffusion.schedule, x_n, n)",
     "x_n", "score"),
    ("weights of the score used as weights of the noise", "ScoreMatching.__init__",
     "weights / diffusion.schedule.sigma**2",
     "weights", "score_matching"),
    ("the wrong sign of the divergence", "_flow",
     "(_standard_normal(end) if base is None else np.asarray(base(end))) + np.asarray(change, np.float64)",
     "(_standard_normal(end) if base is None else np.asarray(base(end))) - np.asarray(change, np.float64)", "flow"),
    ("twice the drift of Langevin's step", "_annealed_langevin",
     "size / 2 * score(diffusion, x, n)",
     "size * score(diffusion, x, n)", "samplers"),
    ("η instead of η² in DDIM", "_ddim_coefficients",
     "eta**2",
     "eta", "samplers"),
    ("the same noise in every batch of samples", "_draw",
     "_draw_batch(one, diffusion, arguments, key, numbers, mesh)",
     "_draw_batch(one, diffusion, arguments, key, numbers - numbers[0], mesh)", "samplers"),
    ("more evaluations than are reported", "_round",
     "counts",
     "(STEPS, RECONSTRUCTIONS)", "random_steps"),
    ("half the steps of a datum have twice the variance", "_smaller",
     "4 * rounds <= 1",
     "2 * rounds <= 1", "random_steps"),
    ("the rate of a resumed fit counts the updates before it", "fit",
     "bar.initial = bar.n = bar.last_print_n = kept",
     "bar.initial = bar.n = kept", "training"),
    ("levels from 3 are categories from 0", "MixtureKernel.check_parts",
     "first == 0",
     "True", "bad_input"),
    ("few evaluations of few data, whose error says little", "_smaller",
     "num_data * steps >= 2 * STEPS * DATA_AT_ONCE",
     "num_data", "random_steps"),
    ("the upper bound has a path too many", "sandwich",
     "below[: k - 1]",
     "below[:k]", "importance"),
]  # fmt: skip

# %%
MODEL = [
    ("the log-likelihood of z_n without its ½", "CategoricalHead._normalised",
     "jnp.square(distance) / 2",
     "jnp.square(distance)", "heads"),
    ("the noise variance instead of its root in a head", "DensityHead.noise",
     "jnp.sqrt(signal_and_noise(log_snr)[1])",
     "signal_and_noise(log_snr)[1]", "heads"),
    ("the SNR difference of another step", "MixtureKernel.excess",
     "snr[:-1]",
     "snr[1:]", "heads"),
    ("the schedule of the guide is not trained", "Diffusion.guide_schedule",
     "self.with_param_site().schedule",
     "self.schedule", "learned"),
    ("the optimal variance without β̃", "OptimalVariance.__call__",
     "jnp.log1p(jnp.asarray(factor, known.dtype) * known[1:])",
     "jnp.log(jnp.asarray(factor, known.dtype) * known[1:])", "learned"),
    ("the shape of the schedule raises the variance", "StepObjective._minus_variance",
     "jax.lax.stop_gradient(mean_square) - mean_square",
     "mean_square - jax.lax.stop_gradient(mean_square)", "learned"),
    ("the sum of an ensemble instead of its mean", "Ensemble.__call__",
     "functools.reduce(operator.add, predicted) / len(self.networks)",
     "functools.reduce(operator.add, predicted)", "networks"),
    ("columns on a grid are rounded where a gradient is taken", "ColumnLikelihood.unrounded",
     "part.unrounded(piece)",
     "part.decode(piece)", "columns"),
    ("the constant of the first step counts", "GaussianKernel.constant",
     "xp.zeros_like(log_ratio[:1])",
     "(xp.expm1(-log_ratio[:1]) + log_ratio[:1]) / 2", "own_parts"),
    ("a kernel of another network is accepted", "Diffusion.with_kernel",
     "kernel.check_parts(self.network, self.likelihood)",
     "None", "bad_input"),
    ("an estimator that needs a KL in closed form is compared by default", "suitable_estimators",
     "diffusion.kernel.closed_form",
     "True", "comparisons"),
    ("the variance over the draws without that between their blocks", "_added",
     "old + new + jnp.square(change) * seen * count / total",
     "old + new", "terms"),
    ("a block of steps begins one too late", "_in_blocks",
     "2 + each",
     "3 + each", "terms"),
    ("a bound model keeps its param site", "Diffusion.from_param_site",
     "jax.tree.leaves(own) and not self.frozen",
     "jax.tree.leaves(own)", "diffusion"),
    ("a bound model loses its learned schedule", "Diffusion.bind",
     "trained._replaced(frozen=True, training=False)",
     "trained.evaluated()", "diffusion"),
    ("DDIM reads the schedule before it is evaluated", "ddim",
     """
     diffusion = _evaluated(diffusion, context)
     taken = _subsequence(diffusion, steps)
     require(0 <= eta <= 1, "eta", "0 <= eta <= 1", eta)
     coefficients = _ddim_coefficients(diffusion.schedule, taken, eta)
     """,
     """
     taken = _subsequence(diffusion, steps)
     require(0 <= eta <= 1, "eta", "0 <= eta <= 1", eta)
     coefficients = _ddim_coefficients(diffusion.schedule, taken, eta)
     diffusion = _evaluated(diffusion)
     """, "diffusion samplers"),
    ("the log-SNR of the digits at n = 1 is halved", "default_diffusion",
     "2 * float(np.log(3.4 * width))",
     "float(np.log(3.4 * width))", "fit"),
]  # fmt: skip

# %%
# Parallel in n, and on several devices.
PARALLEL = [
    ("maps composed in the wrong order", "_composed",
     "later[0] * earlier[1] + later[1]",
     "earlier[0] * later[1] + earlier[1]", "parallel"),
    ("a path that begins at 0 instead of x_0", "ForwardChain.sample",
     "added.at[-1].add(factor[-1] * x0)",
     "added", "parallel"),
    ("the network is told the step before", "ReverseChain.log_prob",
     "self.steps[:-1, 0]",
     "self.steps[1:, 0]", "parallel"),
    ("the whole batch on each device", "Loop._updates",
     "shard(take(data, rows), self.mesh)",
     "take(data, rows)", "sharding"),
]  # fmt: skip

# %%
CONTEXT = [
    ("the context of another row", "of_batch",
     "jnp.broadcast_to(rows, (*batch, *leaf.shape[1:]))",
     "jnp.broadcast_to(jnp.roll(rows, 1, 0), (*batch, *leaf.shape[1:]))", "conditional"),
    ("the context is not minibatched", "Loop._updates",
     "x, context = shard(take(data, rows), self.mesh)",
     "x, context = shard((data[0][rows], take(data[1], slice(len(rows)))), self.mesh)", "conditional"),
    ("the context dropped at n = 1", "Diffusion.predict",
     "self._context(jnp.shape(z)[:-1])",
     "jax.tree.map(lambda c: jnp.where(jnp.asarray(n == 1).reshape(*jnp.shape(n), *(1,) * (c.ndim - jnp.ndim(n))), 0 * c, c), self._context(jnp.shape(z)[:-1]))",
     "conditional closed_form"),
    ("a part of the data with the context of the first part", "data_set_elbo",
     "diffusion.take(rows)",
     "diffusion.take(slice(len(rows)))", "conditional"),
    ("paths of a datum with the context of the first datum", "path_elbo",
     "take(data, rows % len(x))",
     "(x[rows % len(x)], take(diffusion.context, 0 * rows))", "conditional"),
    ("the flow of a part with the context of the first part", "_flow",
     "diffusion.take(rows)",
     "diffusion.take(slice(len(rows)))", "conditional"),
    ("samples of a batch with the context of the first batch", "_draw_batch",
     "take(diffusion.context, numbers)",
     "take(diffusion.context, numbers - numbers[0])", "samplers conditional"),
    ("posterior noise from points of any context", "StepObjective._known_noise",
     "jnp.where(same_rows(context), of_same, -jnp.inf)",
     "of_same", "conditional"),
    ("the sum of the weights of the paths instead of their mean", "ConditionalEstimate._log_prob",
     "jax.nn.logsumexp(log_weights, 0) - jnp.log(self.count)",
     "jax.nn.logsumexp(log_weights, 0)", "likelihood"),
    ("the mean log weight instead of the log of the mean weight", "ConditionalEstimate._log_prob",
     "jax.nn.logsumexp(log_weights, 0) - jnp.log(self.count)",
     "log_weights.mean(0)", "likelihood"),
    ("every proposal with the same random numbers", "PseudoMarginal.sample",
     "self._potential(noise_key, *model_args, **(model_kwargs or {}))",
     "self._potential(jax.random.key(0), *model_args, **(model_kwargs or {}))", "likelihood"),
    ("the sites of a likelihood leak into the program around it", "_ConditionalLikelihood.sample",
     """
     with handlers.block():
         return handlers.seed(self.diffusion.model, key)(None)
     """,
     "return handlers.seed(self.diffusion.model, key)(None)", "likelihood"),
    ("the context is trained", "Diffusion.trainable",
     "eqx.filter(self.with_context(None), is_trainable)",
     "eqx.filter(self, is_trainable)", "conditional"),
    ("the regression of another dimension on the covariates", "MLP.__call__",
     "along_last_axis(self.regress, covariates[0])[..., None]",
     "along_last_axis(self.regress, covariates[0])[..., ::-1, None]", "networks"),
    ("the skip connection ignores the regression on the covariates", "MLP.__init__",
     "inputs = dim * (1 + 2 * num_harmonics + (context_dim is not None))",
     "inputs = dim * (1 + 2 * num_harmonics)", "networks"),
]  # fmt: skip

# %%
PARTICLES = [
    ("one particle that overflows makes the estimate NaN", "_look",
     "jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)",
     "log_weights", "particles"),
    ("an incremental weight dropped", "_steps",
     "kept.log_weights + log_ratio - kept.twisted.log_prob",
     "kept.log_weights + log_ratio", "particles"),
    ("the proposal's density left out", "_steps",
     "p.log_prob(z) - q.log_prob(z)",
     "p.log_prob(z)", "particles"),
    ("resampled without resetting the weights", "_resampled",
     "jnp.where(few, 0, seen.log_weights)",
     "seen.log_weights", "particles"),
    ("resampled without counting the evidence so far", "_resampled",
     "seen.log_evidence + jnp.where(few, _log_mean(seen.log_weights), 0)",
     "seen.log_evidence", "particles"),
    ("the final likelihood forgotten", "_look",
     "jnp.where(n == 1, log_last, twisted.log_prob)",
     "twisted.log_prob", "particles"),
    ("the twist at z_n is not counted", "_look",
     "state.log_weights + twisted.log_prob",
     "state.log_weights", "particles"),
    ("the sum of the weights instead of their mean", "_log_mean",
     "jax.nn.logsumexp(log_weights) - jnp.log(len(log_weights))",
     "jax.nn.logsumexp(log_weights)", "particles"),
    ("x is not moved to the y that was observed", "LinearGaussian.last_step",
     "x + gain.T @ jax.scipy.linalg.cho_solve((of_y.scale_tril, True), self.y - y)",
     "x", "particles"),
    ("equal weights for the runs of a posterior", "Posterior.of_runs",
     "run.log_evidence - logsumexp(run.log_weights)",
     "-logsumexp(run.log_weights)", "particles"),
    ("the path of a simulated y is resampled away", "_multinomial",
     "jax.random.categorical(key, log_weights, shape=log_weights.shape).at[0].set(0)",
     "jax.random.categorical(key, log_weights, shape=log_weights.shape)", "particles"),
    ("the path of a simulated y in reverse order", "_bounds",
     "trace['z']['value'][::-1, 0]",
     "trace['z']['value'][:, 0]", "particles"),
    ("observed and hidden values of a datum interchanged", "read_observation",
     "mask, values = ~np.isnan(known), np.nan_to_num(known)",
     "mask, values = np.isnan(known), np.nan_to_num(known)", "posterior"),
    ("hidden values are observed", "Inpainting.last_step",
     "jnp.where(self.mask, of_each.log_prob(self.values), 0).sum()",
     "of_each.log_prob(self.values).sum()", "particles"),
    ("a derivative that gives negative variances is believed", "TweedieTwist.__call__",
     "jnp.where(credible, covariance, _product(of_y.slope * own, of_y.slope.T))",
     "_positive(covariance)", "uncertainty"),
    ("proposals follow a derivative that is not believed", "TweedieTwist.__call__",
     "jnp.where(credible, rows, of_y.slope * own / ratio)",
     "rows", "uncertainty"),
    ("the uncertainty of step N at step 1", "measure_uncertainty",
     "jnp.square(x0 - x0[-1]).mean(1)[::-1]",
     "jnp.square(x0 - x0[-1]).mean(1)", "uncertainty"),
]  # fmt: skip

MISSING = [
    ("padding for a missing value has no noise", "Inpainting.covariance",
     "1 - self.mask[self.index].astype(x.dtype)",
     "jnp.zeros(len(self.index), x.dtype)", "missing"),
    ("a hidden coordinate in the mean of y", "Inpainting.mean",
     "jnp.where(self.mask, x, 0)[self.index]",
     "x[self.index]", "missing"),
    ("a hidden value is checked", "Inpainting.check",
     "jnp.where(self.mask, self.values, somewhere)[None]",
     "self.values[None]", "missing"),
    ("a run with the missing values of another datum", "observed_log_prob",
     "part // count",
     "part % len(values)", "missing"),
    ("all data given the context of the first", "_evidences",
     "problem.diffusion.with_context(take(context, None))",
     "problem.diffusion", "missing"),
    ("the mask of a masked array is ignored", "_read",
     "mask & there",
     "mask", "missing"),
    ("the error of one run instead of that of the mean", "log_mean_with_error",
     "ratio.std(0, ddof=1) / np.sqrt(count)",
     "ratio.std(0, ddof=1)", "missing"),
    ("a normal tilted without its variance", "DiagonalTwist.__call__",
     "x0 + variance * tilt",
     "x0 + tilt", "missing"),
    ("levels tilted the other way", "DiagonalTwist.__call__",
     "log_p + tilt[:, None] * _grid(log_p)",
     "log_p - tilt[:, None] * _grid(log_p)", "missing"),
    ("the noise of the last step instead of that of x_0", "DiagonalTwist.__call__",
     "variance + _last_variance(diffusion, z)",
     "_last_variance(diffusion, z)", "missing"),
]  # fmt: skip

# Priors and likelihoods in programs of one's own.
PRIORS = [
    ("the Jacobian of the flow left out of the prior", "FlowPrior.log_prob",
     "self.base_dist.log_prob(z) + log_det",
     "self.base_dist.log_prob(z)", "priors"),
    ("Euler's steps instead of Heun's", "solve",
     "length / 2 * (a + b)",
     "length * a", "priors"),
    ("under plates the first axis is taken for the axis of the steps", "ChainPrior.__call__",
     "jnp.moveaxis(sampled, -2, 0)",
     "sampled", "priors"),
    ("parts of the effective sample sizes in the wrong order", "run_particles",
     "ess[::-1]",
     "ess", "particles"),
    ("the number of columns is taken for the dimension of the chain", "_ConditionalLikelihood.__init__",
     "datum.shape",
     "(diffusion.dim,)", "likelihood"),
]  # fmt: skip

CONTEXT_FILES = [
    ("the rows of the context are not shuffled with those of x", "split_table",
     "covariates.encode(table.context)[order]",
     "covariates.encode(table.context)", "datasets"),
    ("the context standardised by all splits", "split_table",
     'Covariates.of(table.context, rows["train"])',
     "Covariates.of(table.context, order)", "datasets"),
    ("the context standardised by the test split", "split_table",
     'Covariates.of(table.context, rows["train"])',
     'Covariates.of(table.context, rows["test"])', "datasets"),
    ("later contexts standardised by themselves", "Covariate.encode",
     "(self._numbers(cells)[:, None] - self.loc) / self.scale",
     "(self._numbers(cells)[:, None] - self._numbers(cells).mean()) / (self._numbers(cells).std() or 1)", "datasets"),
    ("an unknown label is the first", "Covariate.encode",
     "~of_category.any(1)",
     "of_category.all(1)", "datasets"),
    ("numbers of a context are decoded without their mean", "Covariate.decode",
     "array[:, 0] * np.float64(self.scale) + self.loc",
     "array[:, 0] * np.float64(self.scale)", "datasets"),
    ("the columns of a later context by position", "Covariates._cells",
     "{name: cells_of(rows[name]) for name in self.names}",
     "dict(zip(self.names, map(cells_of, rows.values())))", "datasets"),
    ("named values of a context by position", "Covariates.parse",
     "self.encode({name: [value] for name, value in pairs})",
     "self.encode({name: [pair[1]] for name, pair in zip(self.names, pairs)})", "datasets"),
    ("the columns of the context are data, too", "read_frame",
     "key != index and key not in given",
     "key != index", "datasets"),
    ("columns counted from 1", "chosen",
     "names[int(each)]",
     "names[int(each) - 1]", "datasets"),
    ("a digit with the label of the next", "_digits",
     "covariates.encode(labels)",
     "covariates.encode(np.roll(labels, 1))", "datasets"),
    ("a context with another number of rows is accepted", "beside",
     "{len(table.array)}",
     "rows", "datasets"),
    ("the parameters of the optimiser for the best of a checkpoint", "Checkpoint.load_best",
     "leaves[len(leaves) - len(jax.tree.leaves(template)):]",
     "leaves[1:1 + len(jax.tree.leaves(template))]", "run"),
    ("validation and test contexts are interchanged on disk", "save_data",
     "[data.train_context, data.validation_context, data.test_context]",
     "[data.train_context, data.test_context, data.validation_context]", "run"),
    ("categories are lost on disk", "_make_covariate",
     "categories and tuple(categories)",
     "None", "run"),
    ("a run accepts data without checking their context", "check_splits",
     "diffusion.given(context).check_data(split)",
     "diffusion.likelihood.check_data(split)", "run"),
    ("a run whose context changes with the file", "_prepare",
     "dataset if diffusion.is_conditional else None",
     "None", "context"),
    ("a fit is resumed with another context", "_reopen",
     "given | ({'data': _data_name(arguments.data)} if arguments.data else {}) | _columns(arguments)",
     "given | ({'data': _data_name(arguments.data)} if arguments.data else {})", "context"),
    ("a fit with the rows of the context in reverse order", "_fit_and_evaluate",
     "dataset.train_context",
     "dataset.train_context[::-1]", "context"),
    ("a fit validated with the context of other rows", "_fit_and_evaluate",
     "dataset.validation_context",
     "dataset.validation_context[::-1]", "context"),
    ("the report with the context of the validation split", "evaluate",
     "dataset.test_context",
     "dataset.validation_context", "context"),
    ("the two ways with the context of the last items", "evaluate",
     "diffusion.take(some)",
     "diffusion.with_context(diffusion.context[::-1][some])", "context"),
    ("estimators with the context of the last items", "_compare_estimators",
     "dataset.test_context[:count]",
     "dataset.test_context[-count:]", "context"),
    ("models with the context of other items", "_compare_models",
     "data.test_context[rows]",
     "data.test_context[::-1][rows]", "context"),
    ("samples ignore the context that was asked for", "run",
     "_context(dataset, arguments.context, arguments.num_samples)",
     "_context(dataset, None, arguments.num_samples)", "context"),
    ("all samples with the context of the first test datum", "contexts_of_test_data",
     "np.arange(count) % len(dataset.test)",
     "0 * np.arange(count)", "context"),
    ("a file of contexts is repeated or cut without an error", "_context",
     "len(rows) in (1, count)",
     "True", "context"),
    ("samples of one label beside data of all labels", "sample_figures",
     "data[same] if same.any() else data",
     "data", "context"),
    ("the default model ignores the context of a data set", "default_diffusion",
     "dataset.context_dim",
     "None", "context"),
]  # fmt: skip

# Labels, dropped contexts, guidance, and the classifier.
LABELS = [
    ("one draw drops the contexts of all", "ContextDropout.replaced",
     "jax.random.bernoulli(key, self.probability, batch)",
     "jnp.broadcast_to(jax.random.bernoulli(key, self.probability), batch)", "labels"),
    ("contexts are kept with the probability of dropout", "ContextDropout.replaced",
     "jnp.where(dropped[..., None], null, context)",
     "jnp.where(dropped[..., None], context, null)", "labels"),
    ("the null context is not learned", "ContextDropout.replaced",
     "jnp.broadcast_to(self.null, (*batch, *self.null.shape))",
     "jnp.broadcast_to(jax.lax.stop_gradient(self.null), (*batch, *self.null.shape))", "labels"),
    ("the vector of another label", "Embedding.replaced",
     "self.vectors[context]",
     "self.vectors[context - 1]", "labels"),
    ("guidance the other way", "Guided.__call__",
     "(1 + self.weight) * given - self.weight * without",
     "(1 - self.weight) * given + self.weight * without", "labels"),
    ("independent noise for each context", "_excess",
     "jnp.asarray(data)",
     "jnp.asarray(data) + 1000 * jnp.asarray(contexts)", "contexts"),
    ("random steps as if all steps were alike", "CommonTerms.draw",
     "-inverse_probability[..., None] * excess",
     "-self.diffusion.schedule.num_steps * excess", "contexts"),
    ("the mean over all steps of a difference instead of the sum", "CommonTerms.draw",
     "-self.num_terms * excess",
     "-excess", "contexts"),
    ("log-odds of labels without their prior", "_against_best",
     "np.nanmean(difference, 0) + log_prior - log_prior[best]",
     "np.nanmean(difference, 0)", "contexts"),
    ("labels are dropped by the error of one term", "_against_best",
     "np.nanstd(difference, 0, ddof=1) / np.sqrt(count)",
     "np.nanstd(difference, 0, ddof=1)", "contexts"),
    ("the best label is dropped, too", "_against_best",
     "np.put_along_axis(better, best, 1.0, 1)",
     "np.put_along_axis(better, best, 0.0, 1)", "contexts"),
    ("evaluations that are not counted", "classify",
     "spent + terms.num_pilot",
     "spent", "contexts"),
]  # fmt: skip

# %%
FILES = [
    ("a checksum is ignored", "read_checked",
     "hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]",
     "True", "run"),
    ("arrays written in place", "write_bytes",
     "replace(path, lambda temporary: temporary.write_bytes(content))",
     "path.write_bytes(content)", "run"),
    ("no previous checkpoint", "Checkpoint.save",
     "is_intact(self.path)",
     "False", "run"),
    ("a damaged checkpoint replaces the previous one", "Checkpoint.save",
     "is_intact(self.path)",
     "self.path.exists()", "run"),
    ("bytes after an array are ignored", "read_npy",
     "isinstance(array, np.ndarray) and not file.read(1)",
     "isinstance(array, np.ndarray)", "datasets"),
    ("pickled objects are loaded", "read_npy",
     "np.load(file, allow_pickle=False)",
     "np.load(file, allow_pickle=True)", "datasets"),
    ("a folder that exists is written into", "create_run",
     "check_free(path)",
     "None", "run"),
    ("a figure is overwritten", "Run.new_samples",
     """
     for each in paths:
         require(not each.exists(), "out", "a new file", f"{each}, which exists", FileExistsError)
     """,
     """
     for each in paths[:1]:
         require(not each.exists(), "out", "a new file", f"{each}, which exists", FileExistsError)
     """, "sample"),
    ("the splits of the data of a run are interchanged", "load_data",
     "train, validation, test, *more = map(np.asarray, arrays)",
     "validation, train, test, *more = map(np.asarray, arrays)", "run"),
    ("a fit goes on to more iterations before its end", "_reopen",
     "done >= options[limit]",
     "True", "fit"),
    ("every error of a network is blamed on a single-example network", "_call_at_step",
     "(other := _axes_it_takes(call, z, **options))",
     "(other := 'one batch axis')", "networks"),
    ("all copies in a plate are observed through the last", "ParallelPrograms.model",
     "z[-1] if z.ndim == 3 else z[..., -1:, :, :]",
     "z[-1]", "parallel"),
    ("standard output has more than the document", "_document_only",
     "os.dup2(2, 1)",
     "None", "main"),
]  # fmt: skip

# %%
FIT = [
    ("an update that is not finite is taken", "Loop._updates",
     "jax.lax.cond(good, lambda: new._replace(rng_key=None), lambda: old._replace(rng_key=None))",
     "new._replace(rng_key=None)", "training"),
    ("updates that are not finite are not noticed", "Loop.advance",
     "not good",
     "False", "training"),
    ("a resumed fit accepts other options", "_require_same",
     "saved[name] == value",
     "True", "training"),
    ("the keys of a resumed fit are new", "fit",
     "state = (checkpoint and checkpoint.load(state)) or state",
     "state = ((checkpoint and checkpoint.load(state)) or state)._replace(keys=state.keys)", "training"),
    ("the position in the data is lost on a resume", "Loop.advance",
     "start = len(state.losses)",
     "start = 0", "training"),
    ("data rows by the wrong key", "Minibatches.rows",
     "jax.random.fold_in(key, iteration)",
     "jax.random.fold_in(key, 0)", "training"),
    ("without validation, the last parameters instead of their average", "Loop.result",
     "self.averaged(state.svi)",
     "self.svi.get_params(state.svi)", "training"),
    ("with validation, current parameters instead of their average", "Loop.validate",
     "self.averaged(state.svi)",
     "self.svi.get_params(state.svi)", "training"),
    ("the weights of the data are ignored", "Minibatches.rows",
     "self._counted is None",
     "True", "training"),
    ("the optimal variances of data without their weights", "Minibatches.sample",
     "self._counted is None",
     "True", "training"),
    ("layers of zeros are of ones", "zero_linear",
     "jnp.zeros(leaf.shape, leaf.dtype)",
     "jnp.ones(leaf.shape, leaf.dtype)", "networks"),
    ("squared distances to the points are not halved", "PosteriorNoise.__call__",
     "log_weight - squared / 2",
     "log_weight - squared", "estimators"),
    ("the weights of a fit do not depend on its seed", "_prepare",
     "default_diffusion(dataset, options['num_steps'], options['seed'])",
     "default_diffusion(dataset, options['num_steps'])", "fit"),
    ("no bar before the weights are drawn", "_prepare",
     "tqdm(total=1, unit='model', desc='building the model', leave=False, disable=not first)",
     "tqdm(total=1, unit='model', desc='building the model', leave=False, disable=True)", "fit"),
    ("data of weight 0 are points of the posterior noise", "StepObjective._known_noise",
     "PosteriorNoise(x0, jnp.log(jnp.where(weight.any(), weight, 1)))",
     "PosteriorNoise(x0)", "objective"),
    ("a continued fit has the learning rate of a whole fit", "fit",
     "loop_of(None if timed else iterations - settings['begun'])",
     "loop_of(None if timed else iterations)", "training"),
    ("a continued fit begins with the last parameters, not the result", "Loop.begin_anew",
     "self.result(state)",
     "self.svi.get_params(state.svi)", "training"),
    ("the learning rate does not fall", "build_optimiser",
     "optax.warmup_cosine_decay_schedule(0.0, schedule, warm_up, iterations)",
     "optax.warmup_constant_schedule(0.0, schedule, warm_up)", "training"),
    ("the optimal variances of two data only", "fit",
     "max(2, VARIANCE_ROWS // diffusion.schedule.num_steps)",
     "2", "training"),
]  # fmt: skip

# %%
# Conventions of other libraries and papers: predicted variances, networks, schedules.
CONVENTIONS = [
    ("the predicted v_1 is β_1", "_span",
     "xp.log(schedule.beta[:1] / schedule.posterior_variance[1:2])",
     "span[:1]", "predicted"),
    ("the second output is not mapped to a share of the range", "VarianceHead.noise_and_share",
     "(prediction[..., 1, :] + 1) / 2",
     "prediction[..., 1, :]", "predicted"),
    ("log-variance missing in the KL of a predicted variance", "PredictedVarianceKernel.excess",
     "jnp.expm1(-log_ratio) + log_ratio",
     "jnp.expm1(-log_ratio)", "predicted"),
    ("errors weighed as if the predicted variance were the least", "PredictedVarianceKernel.excess",
     "weight * jnp.exp(-log_ratio) * squared",
     "weight * squared", "predicted"),
    ("two outputs read as interleaved instead of consecutive", "VarianceHead.output",
     "output.reshape(*z.shape[:-1], 2, z.shape[-1])",
     "jnp.moveaxis(output.reshape(*z.shape, 2), -1, -2)", "conventions"),
    ("heads inside of a VarianceHead in the wrong order", "VarianceHead.noise",
     "reversed(self._heads())",
     "self._heads()", "conventions"),
    ("the clipped part without its signal scale", "ClipHead.noise",
     "signal * (x0 - jnp.clip(x0, -self.bound, self.bound))",
     "x0 - jnp.clip(x0, -self.bound, self.bound)", "conventions"),
    ("a network of timesteps is told the step", "AtTimesteps.inputs",
     "n - 1 if n is not None else None",
     "n", "conventions"),
    ("SNR instead of 1/SNR in γ", "AtGamma.inputs",
     "-log_snr",
     "log_snr", "conventions"),
    ("c_noise is ½ log σ", "Preconditioned.inputs",
     "-log_snr / 8",
     "-log_snr / 4", "conventions"),
    ("the noise level at t = 0 left out", "vdm_schedule",
     "np.linspace(0.0, 1.0, num_steps)",
     "np.linspace(0.0, 1.0, num_steps + 1)[1:]", "conventional_schedules"),
    ("the betas of 1000 steps for any number of steps", "improved_diffusion_schedule",
     "np.linspace(0.1 / num_steps, 20 / num_steps, num_steps)",
     "np.linspace(0.0001, 0.02, num_steps)", "conventional_schedules"),
]  # fmt: skip

# %%
# Which data tables and figures show, and their errors.
TABLES = [
    ("the logits of categories without the scale of their points", "CategoricalLikelihood.__call__",
     "size ** 0.5 * (loc - middle) / scale ** 2",
     "(loc - middle) / scale ** 2", "columns"),
    ("the points of categories are not centred", "CategoricalLikelihood.points",
     "np.sqrt(size) * np.eye(size) - size ** -0.5",
     "np.sqrt(size) * np.eye(size)", "columns"),
    ("the first part of a table is decoded for all", "ColumnLikelihood.decode",
     "self._split(x0)",
     "[x0[..., :size] for size in self._sizes]", "columns"),
    ("columns come back in the order of the parts", "_together",
     "jnp.concatenate([part.astype(dtype) for part in parts], -1)[..., order]",
     "jnp.concatenate([part.astype(dtype) for part in parts], -1)", "columns"),
    ("the Jacobian of a table is that of its first part", "ColumnLikelihood.log_jacobian",
     "zip(self.parts, self._sizes)",
     "zip(self.parts[:1], self._sizes)", "columns"),
    ("a grid that does not begin at 0 is read as if it did", "DiscretizedNormal.log_prob",
     "value - self.first",
     "value", "columns"),
    ("the evidence of z for its own column is left out", "_mean_of_points",
     "parameter.reshape(columns) * points - jnp.square(distance) / 2",
     "parameter.reshape(columns) * points", "columns"),
    ("columns of a frame are read by position", "ColumnLikelihood.read",
     "given[self.columns[j]]",
     "list(given.values())[j]", "columns"),
    ("a density and a probability are compared", "AbstractLikelihood.discrete",
     "part.points is not None",
     "True", "columns"),
    ("a column of few values is a density", "_kind",
     "has_few_values(values)",
     "False", "datasets"),
    ("ties without a warning", "atom",
     "counts.argmax()",
     "counts.argmin()", "suitability datasets"),
    ("a column that numbers the rows is data", "_index_of",
     "len(frame.columns) > 1 and (counts or unnamed)",
     "False", "datasets"),
    ("the labels of a table are those of another order", "codes",
     "enumerate(labels)",
     "enumerate(sorted(labels, reverse=True))", "datasets"),
    ("the reference of a table is of the training split", "Dataset.independent_columns",
     "self.test.T",
     "self.train[:len(self.test)].T", "datasets"),
    ("raw data without a warning", "warn_of_unsuited",
     "np.square(each).mean() > LARGEST_SQUARE",
     "False", "suitability"),
    ("samples are shown for data", "plot_marginals",
     "_draw_marginal(axes, samples[name], data[name])",
     "_draw_marginal(axes, samples[name], samples[name])", "figures"),
    ("pairs of data above the diagonal", "plot_pairs",
     "data if i > j else samples.head(max(len(data), 200))",
     "data if i < j else samples.head(max(len(data), 200))", "figures"),
    ("gradients for which there is no time are drawn", "draw_estimators",
     "time.monotonic() + prepared + GRADIENT_COST * least * a_draw < deadline",
     "True", "comparisons"),
]

FIGURES = [
    ("the fit is validated on the test data", "_fit_and_evaluate",
     "dataset.validation",
     "dataset.test", "fit"),
    ("models are compared on the training data", "_compare_models",
     "next(iter(datasets.values())).test",
     "next(iter(datasets.values())).train", "compare"),
    ("data are standardised by the test split", "Dataset.likelihood",
     "self.train",
     "self.test", "datasets"),
    ("the Monte Carlo error of one draw instead of that of the mean", "Estimate.of",
     "np.sqrt(np.sum(np.asarray(variance, np.float64)) / num_draws)",
     "np.sqrt(np.sum(np.asarray(variance, np.float64)))", "terms"),
    ("the two ways agree if the data differ enough", "TwoWays.agree",
     "abs(self.z) <= Z_AGREE",
     "abs(self.difference[0]) <= Z_AGREE * np.hypot(self.analytic.error, self.trace.error)", "terms"),
    ("the two ways agree whatever their terms are", "TwoWays.agree",
     "self.common is None or self.common.agree",
     "True", "agreement"),
    ("the term of mean zero has the variance of the other chain", "_traced",
     "q.scale * (q.loc - p.loc) * xi / jnp.square(p.scale)",
     "q.scale * (q.loc - p.loc) * xi / jnp.square(q.scale)", "agreement"),
    ("the sum over the steps of a datum instead of their mean", "_round",
     "values.reshape(-1, len(x)).mean(0)",
     "values.reshape(-1, len(x)).sum(0)", "random_steps"),
    ("a step without a term has a control variate", "Learner.coefficient",
     "((slope + guess) / (power + guess))[self.bins] * self.has_term",
     "((slope + guess) / (power + guess))[self.bins]", "random_steps"),
    ("the updates of convolutions keep their size", "orthogonalised_convolutions",
     "_orthogonalised(u) if _is_convolution(u) else u",
     "u", "training"),
    ("the error of the fit in bits is 0", "_row",
     "-estimate.error",
     "0.0", "fit"),
    ("the error of an estimator in bits is 0", "_row",
     "-error",
     "0.0", "comparisons"),
    ("the gap is not paired", "_reference",
     "Estimate.of(log_prob - elbo)",
     "Estimate.of(log_prob[::-1] - elbo)", "fit"),
    ("the KLs of a range of steps are averaged", "to_datatree",
     "step_kl[:, each].sum(1)",
     "step_kl[:, each].mean(1)", "run arviz"),
    ("ArviZ gets the steps in the wrong order", "arviz_dims",
     "np.arange(diffusion.schedule.num_steps, 0, -1)",
     "np.arange(1, diffusion.schedule.num_steps + 1)", "arviz"),
    ("ArviZ gets the mean of the bound for its sum", "ModelComparison.to_elpd",
     "float(elbo.sum())",
     "float(elbo.mean())", "arviz"),
    ("steps are ranked by a lead within its error", "inspect_terms",
     "lead.mean > STANDS_OUT * lead.error",
     "lead.mean > 0", "inspect"),
    ("an item is the worst though the noise may make it so", "inspect_terms",
     "lead.mean > STANDS_OUT * lead.monte_carlo_error",
     "lead.mean > 0", "inspect"),
    ("the two errors of a term change places", "inspect_terms",
     "['nats', 'error_over_items', 'error_of_noise']",
     "['nats', 'error_of_noise', 'error_over_items']", "inspect"),
    ("inspect draws the figures unasked", "run",
     "arguments.figures",
     "True", "inspect"),
    ("the parts of the gap do not add up as printed", "format_gap",
     "sum(nats.values())",
     "decomposition.gap.mean", "gap"),
    ("images without gaps", "_tiled",
     "np.full((side, side, shape[0] + 1, shape[1] + 1), np.nan)",
     "np.zeros((side, side, shape[0] + 1, shape[1] + 1))", "figures"),
    ("gradients by estimators adapted to values", "_Estimator.__init__",
     "_adapted(name, self.trainable, 'gradient')",
     "_adapted(name, self.trainable, 'value')", "comparisons"),
    ("the variance of a few items instead of that of the batch", "Variance.of_values",
     "cls(parts / num_items, values.shape[1] / num_items)",
     "cls(parts / values.shape[1], values.shape[1] / num_items)", "cost_ratios"),
    ("the variance of an item's gradient instead of the batch's", "_Estimator.collected",
     "size if self.all_steps else 1",
     "1", "comparisons"),
    ("the error of a variance is that of its draws alone", "_error_of_mean",
     "share * of_draws + (1 - share) * of_items",
     "of_draws", "cost_ratios"),
    ("variances of the same draws are taken as independent", "ratio_error",
     "parts[0].shape == parts[1].shape",
     "False", "cost_ratios"),
    ("the lower of two costs is better whatever their errors", "tied_with_best",
     "TIE * errors.loc[known.index, best]",
     "0.0", "cost_ratios"),
    ("the limit of k̂ is that of many draws", "khat_limit",
     "min(1 - 1 / float(np.log10(num_draws)), 0.7)",
     "0.7", "importance"),
    ("the limit of z is that of one score", "_summarise",
     "FAMILY_ERROR / 2 / num_scores",
     "FAMILY_ERROR / 2", "comparisons"),
    ("the solver's error from two equal tolerances", "flow_likelihood",
     "density(looser=LOOSER)",
     "density()", "flow"),
]  # fmt: skip

LIBRARIES = [
    ("parameters of NumPy are constants of from_apply", "from_apply",
     "jnp.asarray(leaf) if _is_floating(leaf) else leaf",
     "leaf", "adapters"),
    ("the statistics of a linen network are trained", "from_apply",
     "sorted(set(params) - {'params'}) if isinstance(params, Mapping) and 'params' in params else []",
     "[]", "bad_input"),
    ("**kwargs of a network are taken for every argument", "takes",
     "name in inspect.signature(network).parameters",
     "name in inspect.signature(network).parameters or any(p.kind is p.VAR_KEYWORD for p in inspect.signature(network).parameters.values())", "adapters"),
    ("a param site in a network goes unnoticed", "_NoParamSites.process_message",
     "msg['type'] not in ('param', 'mutable')",
     "True", "adapters"),
    ("a network that trains nothing goes unnoticed", "Diffusion.from_param_site",
     "svi_begins()",
     "False", "adapters"),
    ("every run of a program is taken for the beginning of an SVI", "svi_begins",
     "frame.f_code is SVI.init.__code__",
     "True", "adapters"),
    ("the host gets float64 in the precision of its thread", "_words",
     "jax.lax.bitcast_convert_type(array, jnp.uint32) if array.dtype == jnp.float64 else array",
     "array", "adapters"),
    ("latents and steps of a mapped call on the host do not match", "_Rows.__call__",
     "flattened(z.ndim - 1, (z, n, given))",
     "flattened(z.ndim - 1, (z, np.sort(n), given))", "adapters"),
    ("the derivative of a network on the host is 0", "_refuse_derivative",
     "raise NotImplementedError(NO_DERIVATIVE)",
     "return _on_host(function, *primals), jnp.zeros_like(primals[0])", "adapters"),
]  # fmt: skip

AUDIT = [
    ("a reading on independent noise", "_excesses",
     "jax.random.fold_in(key, n)",
     "jax.random.fold_in(jax.random.fold_in(key, len(asked)), n)", "audit"),
    ("a network that counts from 0 is asked for n + 1", "_excesses",
     "jnp.clip(ASKED.get(asked, ASKED[OWN])(steps, num_steps), 1, num_steps)",
     "jnp.clip(2 * steps - ASKED.get(asked, ASKED[OWN])(steps, num_steps), 1, num_steps)", "audit"),
    ("the answer is read at the step that was asked for", "_excesses",
     "read(model, name, answer, z, steps)",
     "read(model, name, answer, z, jnp.clip(ASKED.get(asked, ASKED[OWN])(steps, num_steps), 1, num_steps))", "audit"),
    ("another range without its Jacobian", "Recoded.__call__",
     "scale / jnp.asarray(self.scale)",
     "scale", "audit"),
    ("the range of the samples the wrong way around", "_recoded",
     "spread / spread0",
     "spread0 / spread", "audit"),
    ("the slope of the prediction on the noise", "fit_slopes",
     "parts[:, 0].mean(1) / parts[:, 1].mean(1)",
     "parts[:, 1].mean(1) / parts[:, 0].mean(1)", "audit"),
    ("slopes without the weights of the bound", "fit_slopes",
     "weight[:, None, None] * np.mean(draws, 0)",
     "np.mean(draws, 0)", "audit"),
    ("a fault without an effect is reported", "_stands_out",
     "max(SURE * estimate.error, worth * dim)",
     "-1.0", "audit"),
    ("zeros are read as v", "_is_as_good_as_normals",
     "more.mean > SURE * more.error",
     "True", "audit"),
    ("a multiple goes before a sign", "_best",
     "_stands_out(gains[r] - gains[best], dim, worth)",
     "_stands_out(gains[r], dim, worth)", "audit"),
    ("two faults, each credited with the gain of both", "_misread",
     "gains[best] - gains[Reading(OWN, best.answer)]",
     "gains[best]", "audit"),
    ("the best variances without their constants", "_optimal_variance",
     "dim / 2 * (np.expm1(-r) + r) + np.exp(-r) * weight * here",
     "np.exp(-r) * weight * here", "audit"),
    ("the difference of two calls, not halved", "compare_equal_calls",
     "weight[each].sum() * own / 2",
     "weight[each].sum() * own * 2", "audit"),
    ("a batch of copies is replaced by the batch", "_predictions",
     "np.full(len(z), i)",
     "np.roll(np.arange(len(z)), -i)", "audit"),
    ("the error of the steps over draws and data", "audit",
     "step_kl.std(-1, ddof=1) / np.sqrt(len(x))",
     "step_kl.std(-1, ddof=1) / np.sqrt(len(x) * num_draws)", "audit"),
    ("bits/dim of data with a density", "Audit.bits_per_dim",
     "self.levels is None",
     "False", "audit"),
    ("the factor instead of its error in the document", "Audit.to_dict",
     "{'steps': list(s), 'slope': c, 'error': e}",
     "{'steps': list(s), 'slope': c, 'error': c}", "audit"),
    ("the audit of the training data", "run",
     "dataset.test[:count]",
     "dataset.train[:count]", "audit_command"),
]  # fmt: skip

# %%
IMAGES = [
    ("the filters not turned round by the derivative", "_convolve_jvp",
     "_shifted(part, -i, -j)",
     "_shifted(part, i, j)", "unet"),
    ("rows and columns of neighbours exchanged", "_convolved",
     "_shifted(_rounded(image, products), -i, -j)",
     "_shifted(_rounded(image, products), -j, -i)", "unet"),
    ("the derivative with respect to the filters left out", "_convolve_jvp",
     "along_image.astype(image.dtype) + _convolved(image, d_weight, products)",
     "along_image.astype(image.dtype)", "unet"),
    ("pixels scattered into each other's place", "_scattered",
     "image.reshape(*batch, height, width, 2, 2, channels // 4)",
     "jnp.swapaxes(image.reshape(*batch, height, width, 2, 2, channels // 4), -3, -2)", "unet"),
    ("attention across the images of a batch", "_Attention.__call__",
     "asked.reshape(-1, h.shape[-3] * h.shape[-2], HEADS, 3 * (h.shape[-1] // HEADS))",
     "asked.reshape(1, -1, HEADS, 3 * (h.shape[-1] // HEADS))", "unet"),
    ("a mixture without the sum over the levels", "LevelMixtureHead.noise",
     "of_normals = logit - jnp.square(own - signal * mean) / (2 * total) - jnp.log(total) / 2 + log_sum",
     "of_normals = logit - jnp.square(own - signal * mean) / (2 * total) - jnp.log(total) / 2", "unet"),
    ("the noise of z left out of a component's evidence", "LevelMixtureHead.noise",
     "signal**2 * variance + noise**2",
     "signal**2 * variance", "unet"),
    ("the ends of the grid exchanged", "LevelMixtureHead.noise",
     "jnp.array([-1.0, 1.0], z.dtype)",
     "jnp.array([1.0, -1.0], z.dtype)", "unet"),
    ("levels beyond the ends are accepted", "_on_grid",
     "(level < 0) | (level >= levels)",
     "(level < 0) & (level >= levels)", "unet"),
    ("idx numbers with the least significant byte first", "read_idx",
     "np.frombuffer(content, dtype, offset=start)",
     "np.frombuffer(content, dtype.newbyteorder('<'), offset=start)", "images"),
    ("test images among the training images", "load_folder",
     "Dataset(name, flat[:cut], flat[cut:], flat_test, levels=LEVELS, image_shape=shape)",
     "Dataset(name, flat[:cut], flat[cut:], flat[cut:], levels=LEVELS, image_shape=shape)", "images"),
    ("test images of another size", "load_folder",
     "train, test = resized(train, size), resized(test, size)",
     "train = resized(train, size)", "images"),
    ("the labels of other images", "load_folder",
     "np.split(covariates.encode(labels), [cut])",
     "np.split(covariates.encode(labels[::-1]), [cut])", "images"),
    ("levels by the brightest pixel", "split_table",
     "table.levels or int(array.max()) + 1",
     "int(array.max()) + 1", "images"),
    ("the time before a fit was resumed forgotten", "Clock.__init__",
     "time.monotonic() - before",
     "time.monotonic()", "training"),
    ("compilation counted as an update", "Clock.updates_left",
     "(self.spent - start) / (done - first)",
     "self.spent / done", "training"),
    ("a learning rate that does not fall with the time", "Loop.paced",
     "(1 - spent) / updates_left",
     "0 * spent", "training"),
    ("half the learning rate of a fit with a time limit", "scale_by_pace",
     "peak * jnp.minimum(1, state.updates / WARM_UP) * (1 + jnp.cos(jnp.pi * state.spent)) / 2",
     "peak * jnp.minimum(1, state.updates / WARM_UP) * (1 + jnp.cos(jnp.pi * state.spent)) / 4", "training"),
]  # fmt: skip

BUGS = [
    Bug(*bug)
    for bug in (*MATHEMATICS, *MODEL, *PARALLEL, *CONTEXT, *CONTEXT_FILES, *LABELS, *PARTICLES, *MISSING, *PRIORS, *FILES, *FIT, *TABLES, *FIGURES, *CONVENTIONS, *LIBRARIES, *AUDIT, *IMAGES)
]


# %%
def sources(folder):
    """The text of every module of the package in a folder, by its path."""
    return {path: path.read_text() for path in sorted((folder / "probdiff").rglob("*.py"))}


def functions(body, name, prefix=""):
    """The functions of a qualified name, in the statements of a module or a class."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and prefix + node.name == name:
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node.body, name, f"{prefix}{node.name}.")


def parsed(code):
    """The nodes of some code: one expression, or statements."""
    body = ast.parse(textwrap.dedent(code)).body
    return [body[0].value] if len(body) == 1 and isinstance(body[0], ast.Expr) else body


def put(wrong, right, node):
    """Put ``wrong`` in the place of the first ``right`` (lists of nodes) in ``node``; whether there was one."""
    for name, field in ast.iter_fields(node):
        parts = field if isinstance(field, list) else [field]
        for k, part in enumerate(parts):
            if dumps(parts[k : k + len(right)]) == dumps(right):
                parts[k : k + len(right)] = wrong
                setattr(node, name, parts if isinstance(field, list) else parts[0])
                return True
            if isinstance(part, ast.AST) and put(wrong, right, part):
                return True
    return False


def dumps(nodes):
    """Nodes as text, whatever their formatting and place."""
    return [isinstance(node, ast.AST) and ast.dump(node) for node in nodes]


def mutated(bug, modules):
    """The path of the module that a bug is in, and its text with the bug."""
    found, named = [], 0
    for path, text in modules.items():
        if f"def {bug.function.rpartition('.')[2]}(" in text:
            tree = ast.parse(text)
            for function in functions(tree.body, bug.function):
                named += 1
                if put(parsed(bug.wrong), parsed(bug.right), function):
                    found.append((path, ast.unparse(tree)))
    assert named, f"{bug.words}: there is no function {bug.function}"
    assert found, f"{bug.words}: {bug.function} has changed, it has no {' '.join(bug.right.split())}"
    assert len(found) == 1, f"{bug.words}: several functions {bug.function} have {' '.join(bug.right.split())}"
    return found[0]


def files(bug, folder):
    """The files of the tests of a bug."""
    found = [list((folder / "tests").rglob(f"test_{name}.py")) for name in bug.tests.split()]
    assert all(len(each) == 1 for each in found), f"{bug.words}: not one file each for the tests {bug.tests}"
    return [each[0] for each in found]


def problem(bug, modules):
    """Why a bug cannot be made or its tests cannot be run, in a line; None if they can."""
    try:
        compile(mutated(bug, modules)[1], "a module with a bug", "exec")
        files(bug, ROOT)
    except (AssertionError, SyntaxError) as error:
        return str(error)


def first_failure(bug, folder):
    """Run the tests of a bug on the package in ``folder``, up to the first failure; its name, or None if all pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-m", "not long and not release", "-x", "-p", "no:cacheprovider", *files(bug, folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout[-2000:]
    return next((line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR "))), None)


def survivors(bugs):
    """Put each bug by itself into a copy of the package; the descriptions of the bugs that no test notices."""
    folder = Path(tempfile.mkdtemp())
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    for name in ("probdiff", "tests", "docs/own_parts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    modules, found = sources(folder), []
    for bug in tqdm(bugs, unit="bug"):
        path, text = mutated(bug, modules)
        path.write_text(text)
        caught = first_failure(bug, folder)
        path.write_text(modules[path])
        found += [bug.words] * (caught is None)
        tqdm.write(f"{bug.words:66}{'caught by ' + caught if caught else 'NOT CAUGHT'}")
    return found


# %% [markdown]
# The code that each bug changes, and its tests, must exist.

# %%
modules = sources(ROOT)
problems = [line for bug in BUGS if (line := problem(bug, modules))]
if problems:
    sys.exit("\n".join(problems))
print(f"{len(BUGS)} bugs have their place and their tests")

# %% [markdown]
# And its tests must catch it.

# %%
if not arguments.check:
    chosen = [bug for bug in BUGS if arguments.only is None or any(words in bug.words for words in arguments.only)]
    if arguments.quick:
        chosen = [bug for bug in BUGS if bug.tests in ("forward", "schedules properties")]
    left = survivors(chosen)
    print(f"{len(chosen) - len(left)} of {len(chosen)} bugs were caught")
    assert chosen and not left, left

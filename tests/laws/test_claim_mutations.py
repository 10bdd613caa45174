"""For each claim a wrong implementation, or for one that is false the right one: it turns."""

from dataclasses import replace

import pytest
import torch

from fisherlab import optim
from fisherlab.approximations import eigen_corrected, exact, ifang, kronecker_optimal
from fisherlab.approximations.dykaf import DyKAF
from fisherlab.approximations.kfac import KFAC, KFACReduce
from fisherlab.approximations.kl_optimal import KLOptimal
from fisherlab.approximations.kl_shampoo import KLShampoo
from fisherlab.approximations.nystrom import Nystrom
from fisherlab.approximations.running import Running
from fisherlab.approximations.tkfac import TKFAC
from fisherlab.blocks import Outer, contractions
from fisherlab.blocks.basis import matrix_of
from fisherlab.claims import (
    ang,
    chain,
    complexity,
    convergence,
    dense,
    fngd,
    followed,
    foundations,
    get,
    kronecker,
    memory,
    names,
    pooled,
    sketch,
    sngd,
    tekfac,
    today,
    verify,
)
from fisherlab.extract import LayerCapture, fisher
from fisherlab.network import Tridiagonal
from fisherlab.optim import ngd, woodbury
from fisherlab.optim import sngd as network
from fisherlab.statistics import (
    Energy,
    EnergyProduct,
    InputMoment,
    LeftMoment,
    LeftProduct,
    OutputMoment,
    RightMoment,
    RightProduct,
    Statistic,
)

EigenCorrected = eigen_corrected.EigenCorrected


def wrap(owner, name, change):
    """A mutation: `owner.name` becomes `change(what it was)`."""

    def mutate(patch):
        patch.setattr(owner, name, change(getattr(owner, name)))

    return mutate


def put(owner, name, value):
    """A mutation: `owner.name` becomes `value`."""
    return lambda patch: patch.setattr(owner, name, value)


def both(*mutations):
    def mutate(patch):
        for one in mutations:
            one(patch)

    return mutate


def total(kind, change):
    """A mutation of a statistic: its total becomes `change(what it was, layer)`, in every view."""
    before = kind.total

    def mutate(patch):
        patch.setattr(kind, "total", lambda self, layer: change(before(self, layer), layer))
        patch.setattr(kind, "rows", Statistic.rows)

    return mutate


def corrections(change):
    """A change of the corrected eigenvalues; it gets them and the layer."""

    def mutation(method):
        def changed(self, layer, basis):
            return {"spectrum": change(method(self, layer, basis)["spectrum"], layer)}

        return changed

    return mutation


def times(factor):
    return lambda method: lambda *args, **options: factor * method(*args, **options)


def transposed(method):
    def changed(self, layer, basis):
        # of a thin basis, which has no transpose, the vectors are turned around
        turned = {k: matrix_of(basis[k]) for k in ("Q_G", "Q_A")}
        turned = {k: Q.mT if Q.shape[0] == Q.shape[1] else Q.flip(0) for k, Q in turned.items()}
        return method(self, layer, basis | turned)

    return changed


def longer(vectors):
    return lambda *args: (1.1 * v for v in vectors(*args))


def times_positions(product):
    return lambda self, V: self.a.shape[1] * product(self, V)


def damped_more(method):
    return lambda self, V, damping: method(self, V, 2 * damping)


def undamped(method):
    return lambda self, V, damping: method(self, V, 1e-9 * damping)


def square_root_powers(method):
    return lambda self, exponent, damping=0.0: method(self, exponent / 2, damping)


def one_batch(parts):
    """Every batch of a case is the last one."""
    return lambda case: [parts(case)[-1]] * len(parts(case))


def exchanged(init):
    """The weights of past and present change places."""
    return lambda self, approximation, decay=0.95, reduce=None: init(
        self, approximation, 1 - decay, reduce
    )


def only_first(collect):
    """The coefficients of the first batch for all."""
    return lambda self: None if self._sums else collect(self)


def chord(d, t, s, amplitude="natural"):
    return (1 - s) * d + s * t * d.norm() / t.norm()


def scaled_roots(root=1.0, inverse=1.0):
    def mutation(method):
        def changed(S, *args, **options):
            found = method(S, *args, **options)
            return replace(found, root=root * found.root, inverse=inverse * found.inverse)

        return changed

    return mutation


def inverse_for_inverse_root(method):
    def changed(S, *args, **options):
        found = method(S, *args, **options)
        return replace(found, inverse=found.inverse @ found.inverse)

    return changed


def with_options(**fixed):
    return lambda method: lambda S, *args, **options: method(S, **{**options, **fixed})


def rooted_residuals(method):
    def changed(S, *args, **options):
        found = method(S, *args, **options)
        return replace(found, residuals=tuple(r**0.5 for r in found.residuals))

    return changed


def as_optimizer(name):
    """The costs of another optimizer than the claim's."""

    def mutation(create):
        def changed(_, model, **options):
            return create(name, model, lr=options["lr"])

        return changed

    return both(
        wrap(complexity, "create", mutation), put(complexity._Exponent, "largest_size", 512)
    )


def without_projection(patch):
    patch.setattr(complexity.ExactTime, "largest_size", 512)
    as_optimizer("ngd_dense")(patch)


def blend_in_own_norm(patch):
    pair = ang.GNorm._pair

    def changed(self, case):
        found = pair(self, case)
        return {**found, "g_norm": found["d"].norm()}

    patch.setattr(ang.GNorm, "_pair", changed)


def product_set(patch):
    patch.setattr(kronecker.OneUncorrelated, "draw", kronecker.Uncorrelated.draw)
    patch.setattr(kronecker.OneUncorrelated, "assume", lambda self, case: True)


def same_coefficients_for_all(coefficients):
    return lambda self: {n: v.mean(1, keepdim=True) + 0 * v for n, v in coefficients(self).items()}


def gram_of_gradients(a, g):
    """The Gram matrix of the examples' gradients, which are formed."""
    rows = torch.einsum("mnto,nti->noi", g, a).flatten(1)
    return rows @ rows.mT


def second_moments(a, g):
    """Products of the printed cost without `M^2`: no Gram matrix."""
    return [x.flatten(0, -2).mT @ x.flatten(0, -2) for x in (a, g)]


def nearest_product(_, case):
    """The Kronecker product nearest to the averaged block, from its singular vectors."""
    o, i = case["g"][0].shape[-1], case["a"][0].shape[-1]
    F = followed.averaged([dense.block(batch) for batch in memory.parts(case)])
    R = F.view(o, i, o, i).permute(0, 2, 1, 3).reshape(o * o, i * i)
    U, s, Vh = torch.linalg.svd(R)
    return s[0] * torch.kron(U[:, 0].view(o, o), Vh[0].view(i, i))


def damping_times(factor):
    return put(chain, "Tridiagonal", lambda layers, damping: Tridiagonal(layers, factor * damping))


MUTATIONS = {
    # foundations
    "score_has_mean_zero": wrap(fisher, "label_vectors", lambda f: lambda *a: f(*a) + 0.1),
    "empirical_score_has_mean_zero": put(LayerCapture, "gradient", torch.zeros(1)),
    "fisher_is_expected_outer_product": wrap(fisher, "exact_vectors", longer),
    "empirical_fisher_is_fisher": put(foundations.Empirical, "fisher_type", "exact"),
    "fisher_is_minus_expected_hessian": wrap(
        exact.Exact,
        "of_batch",
        lambda f: lambda self, layers: Outer.over(f(self, layers).columns, 1.0),
    ),
    "fisher_is_hessian_of_kl": wrap(Outer, "__matmul__", times_positions),
    "fisher_is_gauss_newton": wrap(fisher, "exact_vectors", longer),
    "exact_fisher_of_a_mean_loss": wrap(
        fisher, "terms_of", lambda f: lambda *args: replace(f(*args), scale=1.0)
    ),
    "scores_of_a_mean_loss_give_its_fisher": wrap(
        dense.Layered, "expected_outer", lambda f: lambda self, V, c=1.0: f(self, V, c**0.5)
    ),
    "kl_is_quadratic_to_second_order": wrap(Outer, "quadratic", times(1.1)),
    "natural_gradient_is_steepest_in_kl": wrap(
        Outer, "leading", lambda f: lambda self, k: (f(self, k)[0] ** 0.5, f(self, k)[1])
    ),
    "natural_gradient_is_invariant_to_first_order": wrap(Outer, "power", square_root_powers),
    "woodbury_step_is_dense_step": wrap(Outer, "solve", damped_more),
    "tengrad_step_is_dense_blockwise_step": wrap(
        woodbury, "weights_of", lambda f: lambda K, *rest: f(K * len(K), *rest)
    ),
    "joint_ngd_from_summed_gram_matrices": wrap(
        ngd,
        "joint_step",
        lambda f: lambda F, g, damping: f(F, g, {n: 2 * x for n, x in damping.items()}),
    ),
    "large_beta_is_scaled_sgd": wrap(
        ngd,
        "joint_step",
        lambda f: lambda F, g, damping: f(F, g, {n: x / 10 for n, x in damping.items()}),
    ),
    "small_beta_lengthens_the_step": wrap(
        ngd,
        "joint_step",
        lambda f: lambda F, g, damping: f(F, g, {n: x / 4 for n, x in damping.items()}),
    ),
    "cross_entropy_lengthens_the_natural_step": wrap(
        ngd,
        "joint_step",
        lambda f: lambda F, g, damping: f(F, g, {n: 1e4 * x for n, x in damping.items()}),
    ),
    "natural_step_gains_more_under_squared_error": wrap(
        ngd,
        "joint_step",
        lambda f: lambda F, g, damping: f(F, g, {n: 1e8 * x for n, x in damping.items()}),
    ),
    "mass_off_the_block_diagonal": wrap(Outer, "gram", lambda f: lambda self: f(self).square() + 1),
    # TEKFAC: one batch
    "corrected_eigenvalues_are_optimal": wrap(EigenCorrected, "corrections", transposed),
    "tekfac_error_at_most_tkfac": wrap(EigenCorrected, "corrections", transposed),
    "ekfac_error_at_most_kfac": wrap(EigenCorrected, "corrections", transposed),
    "tkfac_keeps_the_trace": total(Energy, lambda x, layer: 2 * x),
    "ekfac_keeps_the_trace": wrap(
        EigenCorrected, "corrections", corrections(lambda x, layer: x * layer.positions)
    ),
    "tekfac_keeps_the_trace": wrap(
        EigenCorrected, "corrections", corrections(lambda x, layer: x * layer.examples)
    ),
    "tkfac_of_summed_positions_keeps_the_trace": put(tekfac.SummedTrace, "approximation", TKFAC()),
    "kfac_keeps_the_trace": put(tekfac.KfacTrace, "approximation", TKFAC()),
    "kfac_trace_error_is_a_covariance": total(OutputMoment, lambda x, layer: x * layer.examples),
    "tkfac_beats_kfac_usually": total(Energy, lambda x, layer: x / 9),
    "tkfac_beats_kfac_when_pooled_out_of_sample": put(pooled, "TKFAC", KFACReduce),
    "tkfac_error_at_most_kfac": put(tekfac, "TKFAC", kronecker_optimal.KroneckerOptimal),
    "tekfac_beats_ekfac_usually": wrap(
        EigenCorrected, "corrections", corrections(lambda x, layer: 3 * x)
    ),
    # Kronecker products
    "shampoo_squared_is_adafactor_in_its_eigenbasis": wrap(
        EigenCorrected, "corrections", transposed
    ),
    "kl_optimal_kronecker_product_is_a_lower_bound": put(today.KLBound, "approximation", KFAC()),
    "kl_optimal_kronecker_product_is_a_fixed_point": put(
        today.KLFixedPoint, "approximation", KFAC()
    ),
    "soap_is_the_best_diagonal_in_shampoos_basis": wrap(EigenCorrected, "corrections", transposed),
    "shampoo_is_kl_optimal_for_one_factor": total(
        LeftMoment, lambda x, layer: OutputMoment().total(layer)
    ),
    "kl_shampoo_comes_to_rest_at_the_kl_optimum": wrap(KLShampoo, "_inverse", times(1.1)),
    "shampoo_is_kl_optimal_for_two_factors": put(today, "Shampoo", lambda form: KLOptimal()),
    # over time
    "dykaf_is_nearer_to_a_moving_block_usually": put(
        followed.DykafUsually, "approximation", KLShampoo()
    ),
    "dykaf_is_nearer_to_a_moving_block": put(followed, "followed", nearest_product),
    "dykaf_is_exact_while_one_factor_rests": wrap(
        DyKAF, "step", lambda f: lambda self, F, G, A, past: f(self, F, G, A, past**2)
    ),
    "dykaf_is_exact_for_kronecker_products": put(followed.DykafMoving, "rests", True),
    "kl_shampoo_is_nearer_in_kl_usually": wrap(KLShampoo, "_inverse", times(10)),
    # sketches
    "nystrom_is_never_above_the_block": put(sketch, "Nystrom", lambda rank: Nystrom(rank, 1)),
    "nystrom_error_at_most_the_tail": put(sketch, "Nystrom", lambda rank, seed: Nystrom(1, seed)),
    "nystrom_preconditioner_has_condition_28": put(
        sketch, "Nystrom", lambda rank, seed: Nystrom(1, seed)
    ),
    "nystrom_preconditioner_of_any_rank_has_condition_28": put(
        sketch.NystromAnyRank, "draw", sketch.NystromPreconditioner.draw
    ),
    # layers that follow each other
    "tridiagonal_kfac_has_a_tridiagonal_inverse": damping_times(1.1),
    "tridiagonal_kfac_is_nearer_in_kl_than_block_diagonal": damping_times(100),
    "tridiagonal_kfac_is_nearer_in_kl_to_the_fisher": put(
        chain.TridiagonalOfFisher, "target", chain.TridiagonalGain.target
    ),
    "optimal_kronecker_product_is_a_lower_bound": put(kronecker, "KroneckerOptimal", KFAC),
    "optimal_kronecker_product_is_a_singular_vector": put(kronecker, "KroneckerOptimal", TKFAC),
    "tkfac_is_shampoo_squared": both(
        total(LeftMoment, lambda x, layer: LeftProduct().total(layer)),
        total(RightMoment, lambda x, layer: RightProduct().total(layer)),
        total(Energy, lambda x, layer: EnergyProduct().total(layer)),
    ),
    "tkfac_as_printed_is_partial_traces": total(Energy, lambda x, layer: x * layer.examples),
    "tkfac_is_the_first_step_to_the_optimum": total(
        LeftMoment, lambda x, layer: OutputMoment().total(layer)
    ),
    "kfac_is_tkfac_when_uncorrelated": total(InputMoment, lambda x, layer: 2 * x),
    "kfac_is_tkfac_when_one_is_uncorrelated": product_set,
    "kfac_is_exact_for_linear_networks": total(OutputMoment, lambda x, layer: x * layer.examples),
    "kfac_is_exact_for_networks": put(kronecker.NonlinearNetwork, "activations", ("identity",)),
    "kfac_and_tkfac_are_exact_for_one_example": total(Energy, lambda x, layer: 2 * x),
    # outside one batch
    "ekfac_error_at_most_kfac_out_of_sample": wrap(memory, "parts", one_batch),
    "tekfac_error_at_most_tkfac_out_of_sample": wrap(memory, "parts", one_batch),
    "tekfac_error_at_most_tkfac_with_memory": wrap(memory, "parts", one_batch),
    "averaged_theta_survives_a_new_basis": wrap(memory, "parts", one_batch),
    "carried_theta_keeps_the_trace": wrap(Running, "__init__", exchanged),
    # ANG
    "ang_point_is_the_minimiser": put(
        KFAC, "damped", lambda self, block, damping: block.power(-1, damping)
    ),
    "ang_point_is_the_minimiser_for_any_weights": put(
        ang.AnyWeights, "weights", ang._Minimiser.weights
    ),
    "ang_blend_rotates_on_the_sphere": put(ang, "blended", chord),
    "ang_chord_is_shorter_than_the_sphere": wrap(ang, "blended", times(0.5)),
    "ang_blend_has_unit_length_in_the_g_norm": blend_in_own_norm,
    "ang_factors_by_a_scalar_inverse": put(
        ifang.IFANG, "damped", lambda self, block, damping: block.power(-1, damping)
    ),
    "ang_factors_as_printed": put(ang.PrintedFactors, "right", ang.Factors.right),
    "ang_ends_as_sgd_up_to_a_layer_factor": wrap(optim.ang, "mixed", times(0.5)),
    "ang_ends_as_sgd": put(ang.AngIsSGD, "factor", ang.AngEnd.factor),
    # SNGD
    "sngd_step_is_a_natural_step": wrap(network, "by_eigh", inverse_for_inverse_root),
    "sngd_refresh_keeps_the_function": wrap(network, "by_eigh", scaled_roots(root=2.0)),
    "sngd_refresh_as_printed": wrap(
        sngd.PrintedRefresh,
        "assign",
        lambda f: lambda self, module, factor: f(self, module, torch.linalg.inv(factor)),
    ),
    "newton_schulz_converges": wrap(sngd, "newton_schulz", with_options(scale=False)),
    "denman_beavers_converges": wrap(sngd, "denman_beavers", scaled_roots(inverse=2.0)),
    "newton_schulz_without_scaling_below_three": wrap(
        sngd, "newton_schulz", with_options(iterations=2)
    ),
    "newton_schulz_without_scaling": wrap(sngd, "newton_schulz", with_options(scale=True)),
    "newton_schulz_is_quadratic": wrap(sngd, "newton_schulz", rooted_residuals),
    # FNGD
    "fngd_coefficients_are_the_natural_step": wrap(
        fngd, "weights_of", lambda f: lambda K, *rest: f(K * len(K), *rest)
    ),
    "fngd_coefficients_with_weight_decay": put(
        fngd.WithDecay, "gradient", fngd.ClosedForm.gradient
    ),
    "fngd_first_phase_is_folded_natural_gradient": wrap(
        woodbury, "weights_of", lambda f: lambda K, damping, fold, name: f(K, damping, False, name)
    ),
    "fngd_coefficients_become_flat": wrap(optim.FNGD, "_collect", only_first),
    "fngd_shared_coefficients_keep_information": wrap(optim.FNGD, "_collect", only_first),
    "fngd_sharing_predicts_the_next_epoch": put(
        fngd.SharingShuffled, "draw", lambda self, *args: fngd.SharingFixed().draw(*args)
    ),
    "fngd_sharing_predicts_fixed_batches": wrap(
        optim.FNGD, "coefficients", same_coefficients_for_all
    ),
    "fngd_theorem_corrected": wrap(Outer, "solve", times(0.1)),
    "fngd_theorem_as_printed": put(convergence.Printed, "rate", convergence.Corrected.rate),
    "fngd_theorem_for_one_layer": wrap(Outer, "solve", undamped),
    "fngd_norm_bound_as_printed": put(convergence.NormBound, "bound", lambda self, value: value),
    "fngd_norm_bound_corrected": wrap(Outer, "solve", damped_more),
    "fngd_lemma_3_as_printed": put(convergence.Lemma3, "factor", 0.5),
    "fngd_lemma_3_corrected": put(convergence.Lemma3Corrected, "factor", 2**-0.5),
    # costs
    "dense_ngd_takes_p3_operations": as_optimizer("ngd"),
    "dense_ngd_stores_p2_numbers": as_optimizer("ngd"),
    "exact_ngd_by_gram_matrices_takes_p_operations": without_projection,
    "tengrad_scales_like_sgd": both(
        as_optimizer("ngd_dense"), put(complexity.TengradTime, "largest_size", 512)
    ),
    "fngd_second_phase_costs_like_sgd": put(optim.FNGD, "collecting", True),
    "fngd_second_phase_adds_md_numbers": put(optim.FNGD, "collecting", True),
    "gram_matrix_costs_m2": wrap(
        contractions,
        "gram",
        lambda f: lambda a, g: contractions.cross_gram(a, g, a[:4], g[:, :4]),
    ),
    "gram_matrix_cost_as_printed": put(contractions, "gram", gram_of_gradients),
    "gram_matrix_cost_for_any_batch": put(contractions, "gram", second_moments),
    "ifang_inverse_is_free_of_n3": put(
        complexity.IfangTime, "approximation", KFAC(placement="factored")
    ),
    "kfac_inverse_takes_n3": put(complexity.KfacTime, "approximation", ifang.IFANG()),
}


def test_every_claim_has_a_mutation_and_no_other():
    assert set(MUTATIONS) == set(names())


@pytest.mark.parametrize("name", names())
def test_a_wrong_implementation_turns_the_verdict(name, monkeypatch):
    MUTATIONS[name](monkeypatch)
    verdict = verify(name, trials=min(get(name).trials, 12)).frame.verdict[0]
    assert verdict != get(name).expected

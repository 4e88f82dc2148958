//! Combining several adapters into one: `ΔW = Σ wᵢ·ΔWᵢ`, exactly, approximately, or with pruning and sign election (TIES, DARE).

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use super::folder::{Factors, Folder};
use super::kind::Kind;
use super::matrix::HostMatrix;
use super::ties_dare::{Mix, Pruning};
use crate::element::DType;
use crate::error::{Error, Result};

const VERB: &str = "combine";

/// The algorithm that combines adapters, with PEFT's names.
///
/// Algorithms without `svd` in the name, except [`Cat`](Self::Cat), combine the `Aᵢ` and the `Bᵢ` separately, each with the weight
/// `√|wᵢ·scalingᵢ|`, and with the sign of `wᵢ` on `A`; all adapters must have the same rank. Those with `svd` combine the products
/// `scalingᵢ·Bᵢ·Aᵢ`, and approximate the result by an SVD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CombinationType {
    /// `A = Σ √|wᵢ·scalingᵢ|·Aᵢ`, `B = Σ √|wᵢ·scalingᵢ|·Bᵢ`: cheap and inexact, because the product has cross terms.
    Linear,
    /// `A = [wᵢ·scalingᵢ·Aᵢ]`, `B = [Bᵢ]`: exact; the rank is the sum of the ranks.
    Cat,
    /// `ΔW = Σ wᵢ·ΔWᵢ`, truncated to a rank.
    #[cfg(feature = "svd")]
    Svd,
    /// Prunes each tensor to its largest elements; then averages, for each element, the adapters that have the majority's sign.
    Ties,
    /// [`Ties`](Self::Ties) on `ΔW`.
    #[cfg(feature = "svd")]
    TiesSvd,
    /// Keeps random elements of each tensor, divided by the density; then sums.
    DareLinear,
    /// Keeps random elements of each tensor, divided by the density; then averages, for each element, the adapters that have the
    /// majority's sign.
    DareTies,
    /// [`DareLinear`](Self::DareLinear) on `ΔW`.
    #[cfg(feature = "svd")]
    DareLinearSvd,
    /// [`DareTies`](Self::DareTies) on `ΔW`.
    #[cfg(feature = "svd")]
    DareTiesSvd,
    /// Prunes each tensor to its largest elements; then sums.
    MagnitudePrune,
    /// [`MagnitudePrune`](Self::MagnitudePrune) on `ΔW`.
    #[cfg(feature = "svd")]
    MagnitudePruneSvd,
}

impl CombinationType {
    /// All combination types with PEFT's names, in PEFT's order.
    pub const ALL: &'static [(&'static str, Self)] = &[
        #[cfg(feature = "svd")]
        ("svd", Self::Svd),
        ("linear", Self::Linear),
        ("cat", Self::Cat),
        ("ties", Self::Ties),
        #[cfg(feature = "svd")]
        ("ties_svd", Self::TiesSvd),
        ("dare_ties", Self::DareTies),
        ("dare_linear", Self::DareLinear),
        #[cfg(feature = "svd")]
        ("dare_ties_svd", Self::DareTiesSvd),
        #[cfg(feature = "svd")]
        ("dare_linear_svd", Self::DareLinearSvd),
        ("magnitude_prune", Self::MagnitudePrune),
        #[cfg(feature = "svd")]
        ("magnitude_prune_svd", Self::MagnitudePruneSvd),
    ];

    /// Its name in PEFT.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }

    fn prunes(self) -> bool {
        !["linear", "cat", "svd"].contains(&self.name())
    }

    fn elects(self) -> bool {
        self.name().contains("ties")
    }

    fn by_svd(self) -> bool {
        self.name().ends_with("svd")
    }
}

impl FromStr for CombinationType {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name).map(|&(_, kind)| kind);
        found.ok_or_else(|| refused("combination_type", name, "one of PEFT's names, such as `linear`, `cat`, `svd` or `ties`"))
    }
}

/// How the sign of an element of the combination is elected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MajoritySign {
    /// The sign of the sum of the adapters' elements.
    #[default]
    Total,
    /// The sign that more adapters have.
    Frequency,
}

impl FromStr for MajoritySign {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "total" => Ok(Self::Total),
            "frequency" => Ok(Self::Frequency),
            _ => Err(refused("majority_sign_method", name, "`total` or `frequency`")),
        }
    }
}

/// The settings of [`combine`]. A setting that the combination type does not use must be `None`.
#[derive(Clone, Debug, PartialEq)]
pub struct Combine {
    /// The algorithm.
    pub combination_type: CombinationType,
    /// The fraction of elements that pruning keeps, from 0 to 1. Required by the types that prune.
    pub density: Option<f64>,
    /// For `ties`, `dare_ties` and their svd variants; `total` by default.
    pub majority_sign_method: Option<MajoritySign>,
    /// The rank of the result, for the svd variants; by default the largest rank of the adapters.
    pub svd_rank: Option<usize>,
    /// The seed of the dare variants; 0 by default. The same seed prunes the same elements.
    pub seed: Option<u64>,
}

impl Combine {
    /// Settings for a combination type, with all others at their defaults.
    pub fn new(combination_type: CombinationType) -> Self {
        Self { combination_type, density: None, majority_sign_method: None, svd_rank: None, seed: None }
    }

    fn check(&self) -> Result<()> {
        let kind = self.combination_type;
        let random = kind.name().contains("dare");
        let used = [
            ("density", self.density.is_some(), kind.prunes()),
            ("majority_sign_method", self.majority_sign_method.is_some(), kind.elects()),
            ("svd_rank", self.svd_rank.is_some(), kind.by_svd()),
            ("seed", self.seed.is_some(), random),
        ];
        for (name, set, used) in used {
            Error::unless(used || !set, VERB, name, "set", "absent: this combination type does not use it")?;
        }
        Error::unless(self.svd_rank != Some(0), VERB, "svd_rank", 0, "at least 1")?;
        match self.density {
            None => Error::unless(!kind.prunes(), VERB, "density", "missing", "a number from 0 to 1"),
            Some(0.0) if random => Err(refused("density", "0", "above 0: kept elements are divided by it")),
            Some(density) => Error::unless((0.0..=1.0).contains(&density), VERB, "density", density, "from 0 to 1"),
        }
    }

    fn mix(&self) -> Mix {
        let kind = self.combination_type;
        let pruning = match self.density.filter(|&density| density < 1.0) {
            None => Pruning::Nothing,
            Some(density) if kind.name().contains("dare") => Pruning::Random(density),
            Some(density) => Pruning::Magnitude(density),
        };
        Mix::new(pruning, kind.elects().then(|| self.majority_sign_method.unwrap_or_default()), self.seed.unwrap_or(0))
    }
}

/// Combines adapters, each with a weight, which may be negative, into one.
///
/// As in PEFT's `add_weighted_adapter`, the result has `lora_alpha = r`; a module that only some of the adapters have is combined from
/// those; a single adapter is always combined by `linear`. Sums are computed in `f64` and rounded once.
///
/// Errors: [`Error::Value`] for an empty list, a weight or an element that is not finite, ranks or shapes that cannot be combined, and a
/// setting that is out of range, missing, or not used; [`Error::Unsupported`] for an adapter that has more than factors, such as DoRA
/// magnitudes or biases.
pub fn combine(adapters: &[(&Folder, f64)], how: &Combine) -> Result<Folder> {
    how.check()?;
    let Some((first, _)) = adapters.first() else { return Err(refused("adapters", "empty", "at least one")) };
    for (adapter, weight) in adapters {
        adapter.only_factors()?;
        Error::unless(weight.is_finite(), VERB, "weight", weight, "a finite number")?;
    }
    let ranks = adapters.iter().flat_map(|(folder, _)| folder.modules().values().map(Factors::rank));
    let how = match adapters.len() {
        1 => Combine::new(CombinationType::Linear),
        _ => Combine { svd_rank: how.svd_rank.or(ranks.max()), ..how.clone() },
    };
    let mut mix = how.mix();
    let names: BTreeSet<&String> = adapters.iter().flat_map(|(folder, _)| folder.modules().keys()).collect();
    let mut modules = BTreeMap::new();
    for name in names {
        let parts: Vec<Part> = adapters
            .iter()
            .filter_map(|(folder, weight)| folder.modules().get(name).map(|factors| Part { factors, weight: *weight }))
            .collect();
        modules.insert(name.clone(), module(name, &parts, &how, &mut mix)?);
    }
    Ok(Folder::new(Some(first.config()), modules)?.of_kinds(kinds(adapters)?))
}

/// The kinds of the modules that are not linear layers. Errors: [`Error::Value`] if the adapters disagree about one.
fn kinds(adapters: &[(&Folder, f64)]) -> Result<BTreeMap<String, Kind>> {
    let mut kinds: BTreeMap<&String, &Kind> = BTreeMap::new();
    for (folder, _) in adapters {
        for name in folder.modules().keys() {
            let kind = folder.kind(name);
            if kinds.insert(name, kind).is_some_and(|other| other != kind) {
                return Err(refused("adapters", &format!("of different kinds in `{name}`"), "updates of one kind of layer"));
            }
        }
    }
    let others = kinds.into_iter().filter(|(_, kind)| **kind != Kind::Linear);
    Ok(others.map(|(name, kind)| (name.clone(), kind.clone())).collect())
}

/// The factors of one adapter for a module, and the adapter's weight.
struct Part<'a> {
    factors: &'a Factors,
    weight: f64,
}

impl Part<'_> {
    /// The factor of `B·A` in the sum.
    fn scale(&self) -> f64 {
        self.weight * f64::from(self.factors.scaling)
    }
}

fn module(name: &str, parts: &[Part], how: &Combine, mix: &mut Mix) -> Result<Factors> {
    let dtype = fits(name, parts)?;
    let (a, b) = match how.combination_type {
        CombinationType::Cat => cat(parts),
        #[cfg(feature = "svd")]
        kind if kind.by_svd() => by_svd(parts, how, mix)?,
        _ => by_factor(name, parts, mix)?,
    };
    let (a, b) = (check_finite(name, a)?, check_finite(name, b)?);
    Ok(Factors { a, b, scaling: 1.0, dtype })
}

/// Checks that all parts are finite and update a weight of one shape. Returns the element type that they share, or else `f32`.
fn fits(name: &str, parts: &[Part]) -> Result<DType> {
    let side = |part: &Part| (part.factors.b.rows(), part.factors.a.cols());
    let Some(first) = parts.first() else { return Ok(DType::F32) };
    for part in parts {
        if !part.factors.a.is_finite() || !part.factors.b.is_finite() {
            return Err(refused("adapters", &format!("not finite in `{name}`"), "finite factors"));
        }
        if side(part) != side(first) {
            let ((n, k), (n2, k2)) = (side(first), side(part));
            return Err(refused("adapters", &format!("{n}×{k} and {n2}×{k2} in `{name}`"), "updates of one shape"));
        }
    }
    let same = parts.iter().all(|part| part.factors.dtype == first.factors.dtype);
    Ok(if same { first.factors.dtype } else { DType::F32 })
}

/// `A = [w·scaling·Aᵢ]`, `B = [Bᵢ]`
fn cat(parts: &[Part]) -> (HostMatrix, HostMatrix) {
    let at: Vec<(&Part, usize)> = parts.iter().flat_map(|part| (0..part.factors.rank()).map(move |q| (part, q))).collect();
    let (n, k) = parts.first().map_or((0, 0), |part| (part.factors.b.rows(), part.factors.a.cols()));
    let a = HostMatrix::from_fn(at.len(), k, |q, j| {
        let (part, q) = at[q];
        part.scale() * f64::from(part.factors.a.values()[q * k + j])
    });
    let b = HostMatrix::from_fn(n, at.len(), |i, q| {
        let (part, q) = at[q];
        f64::from(part.factors.b.values()[i * part.factors.rank() + q])
    });
    (a, b)
}

/// Combines the `Aᵢ` and the `Bᵢ` separately, each weighted by `√|wᵢ·scalingᵢ|`; the sign goes to `A`.
fn by_factor(name: &str, parts: &[Part], mix: &mut Mix) -> Result<(HostMatrix, HostMatrix)> {
    let ranks: BTreeSet<usize> = parts.iter().map(|part| part.factors.rank()).collect();
    if ranks.len() > 1 {
        return Err(refused("adapters", &format!("of ranks {ranks:?} in `{name}`"), "of one rank; `cat` and `svd` need none"));
    }
    let roots: Vec<f64> = parts.iter().map(|part| part.scale().abs().sqrt()).collect();
    let signed: Vec<f64> = parts.iter().zip(&roots).map(|(part, root)| root.copysign(part.scale())).collect();
    Ok((mixed(parts, |factors| &factors.a, &signed, mix), mixed(parts, |factors| &factors.b, &roots, mix)))
}

fn mixed(parts: &[Part], factor: impl Fn(&Factors) -> &HostMatrix, weights: &[f64], mix: &mut Mix) -> HostMatrix {
    let (rows, cols) = parts.first().map_or((0, 0), |part| (factor(part.factors).rows(), factor(part.factors).cols()));
    let tasks = parts.iter().map(|part| factor(part.factors).values().iter().copied().map(f64::from).collect()).collect();
    let sum = mix.run(tasks, weights);
    HostMatrix::from_fn(rows, cols, |i, j| sum[i * cols + j])
}

/// Combines the products, and returns the factors of the best approximation of rank `how.svd_rank`.
#[cfg(feature = "svd")]
fn by_svd(parts: &[Part], how: &Combine, mix: &mut Mix) -> Result<(HostMatrix, HostMatrix)> {
    use super::decompose::Svd;
    let svd = if how.combination_type == CombinationType::Svd {
        let (a, b) = cat(parts); // the exact sum, in factored form
        Svd::of_product(&b, &a, 1.0)?
    } else {
        let (n, k) = parts.first().map_or((0, 0), |part| (part.factors.b.rows(), part.factors.a.cols()));
        let weights: Vec<f64> = parts.iter().map(|part| part.weight).collect();
        let sum = mix.run(parts.iter().map(|part| delta(part.factors)).collect(), &weights);
        Svd::of(&HostMatrix::from_fn(n, k, |i, j| sum[i * k + j]))?
    };
    Ok(svd.factors(how.svd_rank.unwrap_or(usize::MAX))) // always `Some` here: `combine` sets a default
}

/// `scaling·B·A`, row-major.
#[cfg(feature = "svd")]
fn delta(Factors { a, b, scaling, .. }: &Factors) -> Vec<f64> {
    let (n, r, k) = (b.rows(), b.cols(), a.cols());
    let mut delta = vec![0.0; n * k];
    for (i, row) in delta.chunks_exact_mut(k.max(1)).enumerate() {
        for q in 0..r {
            let factor = f64::from(*scaling) * f64::from(b.values()[i * r + q]);
            row.iter_mut().zip(&a.values()[q * k..]).for_each(|(sum, &a)| *sum += factor * f64::from(a));
        }
    }
    delta
}

/// Errors: [`Error::Value`] if a sum in `f64` overflowed when it was rounded to `f32`.
fn check_finite(name: &str, matrix: HostMatrix) -> Result<HostMatrix> {
    if matrix.is_finite() {
        Ok(matrix)
    } else {
        Err(refused("adapters", &format!("not finite in `{name}`"), "a finite combination"))
    }
}

fn refused(name: &'static str, got: &str, want: &'static str) -> Error {
    Error::Value { verb: VERB, name, got: got.into(), want: want.into() }
}

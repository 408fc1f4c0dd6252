// The noise of pyard.diffusion.noise.standard_normal, bit for bit: sample i of a seed is the same in Python and here.
// JavaScript's numbers are IEEE doubles that no compiler contracts into fused multiply-adds, so the same operations in the same order
// give the same bits.

const M0 = 0xd2e7470ee14c6c93n;
const M1 = 0xca5a826395121157n;
const W0 = 0x9e3779b97f4a7c15n;
const W1 = 0xbb67ae8584caa73bn;
const word = (x) => BigInt.asUintN(64, x);

// Philox 4x64-10 (Salmon et al. 2011) of one counter, four words of 64 bits; the key is (seed, sample index).
export function philox(counter, seed, index) {
  let [a, b, c, d] = counter;
  for (let round = 0; round < 10; ++round) {
    const low = M0 * a;
    const high = M1 * c;
    [a, b, c, d] = [(high >> 64n) ^ b ^ seed, word(high), (low >> 64n) ^ d ^ index, word(low)];
    seed = word(seed + W0);
    index = word(index + W1);
  }
  return [a, b, c, d];
}

// Wichura 1988, algorithm AS 241, routine PPND16: [numerator, denominator], lowest power first, of rational functions of r in the
// centre (|p - 1/2| <= 0.425), the tails (r <= 5) and the far tails.
const CENTRE = [
  [3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3],
  [1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3],
];
const TAIL = [
  [1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
    1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4],
  [1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9],
];
const FAR_TAIL = [
  [6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
    2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7],
  [1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
    7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15],
];

function polynomial(coefficients, x) {
  let result = coefficients.at(-1);
  for (let i = coefficients.length - 2; i >= 0; --i) result = result * x + coefficients[i];
  return result;
}

const rational = ([top, bottom], x) => polynomial(top, x) / polynomial(bottom, x);
const SERIES = Array.from({ length: 12 }, (_, k) => 1.0 / (2 * k + 1));
const bits = new DataView(new ArrayBuffer(8));

// log m = 2 artanh((m - 1) / (m + 1)), m the mantissa moved into [sqrt(1/2), sqrt(2)). Math.log may differ from machine to machine.
function logarithm(x) {
  bits.setFloat64(0, x);
  const high = bits.getUint32(0);
  let exponent = (high >>> 20) - 1022;
  bits.setUint32(0, (high & 0x000fffff) | (1022 << 20));
  let mantissa = bits.getFloat64(0);
  if (mantissa < 0.7071067811865476) {
    mantissa *= 2.0;
    exponent -= 1;
  }
  const s = (mantissa - 1.0) / (mantissa + 1.0);
  return exponent * 0.6931471805599453 + 2.0 * s * polynomial(SERIES, s * s);
}

// The x with P(X <= x) = probability of a standard normal X.
export function normalQuantile(probability) {
  const fromCentre = probability - 0.5;
  if (Math.abs(fromCentre) <= 0.425) return fromCentre * rational(CENTRE, 0.180625 - fromCentre * fromCentre);
  const r = Math.sqrt(-logarithm(Math.min(probability, 1.0 - probability)));
  const magnitude = r <= 5.0 ? rational(TAIL, r - 1.6) : rational(FAR_TAIL, r - 5.0);
  return fromCentre < 0.0 ? -magnitude : magnitude;
}

// Sample `index` (BigInt) of a seed (BigInt, 0 to 2**64 - 1): a Float32Array of `size` standard normal numbers.
export function standardNormal(seed, index, size) {
  const noise = new Float32Array(size);
  let words;
  for (let i = 0; i < size; ++i) {
    if (i % 4 === 0) words = philox([BigInt(i / 4 + 1), 0n, 0n, 0n], seed, index); // numpy counts from 1
    noise[i] = normalQuantile((Number(words[i % 4] >> 12n) + 0.5) * 2 ** -52);
  }
  return noise;
}

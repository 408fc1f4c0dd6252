// A student in an ONNX file written by `python -m pyard.export`, run with onnxruntime-web.

import { standardNormal } from './noise.js';

// The metadata entry `pyard` of an ONNX file. onnxruntime-web does not hand out metadata, so it is read from the protobuf message
// itself: ModelProto.metadata_props is field 14, of entries with key (field 1) and value (field 2).
export function readMetadata(bytes) {
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14) continue;
    const [key, value] = [...fields(entry)].map(([, text]) => new TextDecoder().decode(text));
    if (key === 'pyard') return JSON.parse(value);
  }
  throw new Error('this is not a file written by python -m pyard.export: it has no metadata entry "pyard"');
}

function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let shift = 1; ; shift *= 128) {
      if (at >= bytes.length) throw new Error('this is not an ONNX file, or it is cut off');
      const byte = bytes[at++];
      value += (byte & 127) * shift;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const kind = key % 8;
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind !== 2) throw new Error('this is not an ONNX file, or it is cut off');
    else {
      const size = varint();
      if (at + size > bytes.length) throw new Error('this is not an ONNX file, or it is cut off');
      yield [Math.floor(key / 8), bytes.subarray(at, at + size)];
      at += size;
    }
  }
}

export class Student {
  // ort: the module onnxruntime-web; bytes: Uint8Array of the file; provider: 'wasm' or 'webgpu'.
  static async load(ort, bytes, provider) {
    readMetadata(bytes); // says what is no student before onnxruntime does
    const session = await ort.InferenceSession.create(bytes, { executionProviders: [provider], logSeverityLevel: 3 });
    return Student.of(ort, bytes, session);
  }

  static of(ort, bytes, session) {
    return new Student(ort, session, readMetadata(bytes));
  }

  constructor(ort, session, info) {
    this.ort = ort;
    this.session = session;
    this.info = info;
    this.past = session.inputMetadata.filter(({ name }) => name.startsWith('past'));
  }

  noise(seed) {
    const size = this.info.sample_shape.reduce((a, b) => a * b);
    return new this.ort.Tensor('float32', standardNormal(seed, 0n, size), [1, ...this.info.sample_shape]);
  }

  // The condition of one sample of a class.
  label(number) {
    if (this.info.num_classes === null) {
      const names = this.info.conditions.map(({ name }) => name).join(', ');
      throw new Error(`this student is conditioned on ${names}, not on classes`);
    }
    return { label: new this.ort.Tensor('int64', BigInt64Array.of(BigInt(number)), [1]) };
  }

  // Draw one sample; one at a time, since onnxruntime-web runs one call at a time. Yields the S predictions of a file of the form `step`, coarse ones first, as they come; the sample alone of the
  // form `sampler`. A prediction is { step, picture, milliseconds }, the picture a tensor: float32 [1, C, H, W] from -1 to 1, or uint8
  // [1, H, W, 3] of a file with a decoder.
  async *draw(condition, seed) {
    const noise = this.noise(seed);
    if (this.info.form === 'sampler') {
      const { outputs, milliseconds } = await this.run({ noise, ...condition });
      yield { step: 0, picture: outputs.sample, milliseconds };
      return;
    }
    let latent = noise;
    let past = Object.fromEntries(this.past.map((input) => [input.name, this.empty(input)]));
    for (let step = 0; step < this.info.num_steps; ++step) {
      const number = new this.ort.Tensor('int64', BigInt64Array.of(BigInt(step)), []);
      const { outputs, milliseconds } = await this.run({ latent, step: number, ...condition, ...past });
      past = Object.fromEntries(this.past.map(({ name }) => [name, outputs[name.replace('past_key_values', 'present')]]));
      latent = outputs.prediction;
      yield { step, picture: this.info.pictures ? outputs.image : outputs.prediction, milliseconds };
    }
  }

  // Keys or values of no step: [1, H, 0, Dh].
  empty({ type, shape }) {
    const data = type === 'float16' ? new Uint16Array(0) : new Float32Array(0);
    return new this.ort.Tensor(type, data, [1, shape[1], 0, shape[3]]);
  }

  async run(inputs) {
    const begin = performance.now();
    const outputs = await this.session.run(inputs);
    return { outputs, milliseconds: performance.now() - begin };
  }
}

// A prediction as ImageData: red, green and blue, or one channel in grey.
export function toImage({ dims, data, type }) {
  const decoded = type === 'uint8';
  const [height, width, channels] = decoded ? dims.slice(1) : [dims[2], dims[3], dims[1]];
  if (dims.length !== 4 || (channels !== 1 && channels !== 3)) {
    throw new Error(`samples of shape [${dims.slice(1).join(', ')}] are not pictures: export the student with --vae`);
  }
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; ++pixel) {
    for (let colour = 0; colour < 3; ++colour) {
      const channel = channels === 3 ? colour : 0;
      // Uint8ClampedArray rounds and clamps.
      image.data[4 * pixel + colour] = decoded
        ? data[channels * pixel + channel]
        : (data[channel * width * height + pixel] + 1) * 127.5;
    }
    image.data[4 * pixel + 3] = 255;
  }
  return image;
}

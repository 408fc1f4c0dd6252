// A text-to-image student in a folder written by `python -m pyard.export --onnx FOLDER/`, run with onnxruntime-web: text encoders,
// transformer and decoder. One prompt at a time; n tokens, each a vector of D numbers.

import { Tokenizer } from './node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs';
import { Student } from './student.js';

const json = (bytes) => JSON.parse(new TextDecoder().decode(bytes));

export class Pipeline {
  // read: from a place in the folder to a Promise of the file's bytes.
  static async load(ort, read, provider) {
    const config = json(await read('config.json'));
    if (config._class_name !== 'OnnxPipeline' || config.format_version !== 1) {
      throw new Error('this is not a folder written by python -m pyard.export, or one of another version');
    }
    if (config.text === null) throw new Error('this folder was exported without text encoders, so it takes no prompts');
    const options = { executionProviders: [provider], logSeverityLevel: 3 };
    const open = async (place) => {
      const folder = place.slice(0, place.lastIndexOf('/') + 1);
      const weights = Object.keys(config.files).filter((name) => name.startsWith(folder) && name.endsWith('.data'));
      const externalData = await Promise.all(
        weights.map(async (name) => ({ path: name.slice(folder.length), data: await read(name) })));
      const bytes = await read(place);
      return { bytes, session: await ort.InferenceSession.create(bytes, { ...options, externalData }) };
    };
    const [size] = config.sizes; // the usual one
    const { bytes, session } = await open(size.step ?? size.sampler);
    const student = Student.of(ort, bytes, session);
    const decoder = size.decoder && (await open(size.decoder)).session;
    const encoders = await Promise.all(config.text.encoders.map(async (settings) => ({
      settings,
      session: (await open(`${settings.name}/model.onnx`)).session,
      tokenizer: new Tokenizer(...(await Promise.all(
        ['tokenizer.json', 'tokenizer_config.json'].map((name) => read(`${settings.tokenizer}/${name}`)))).map(json)),
    })));
    return new Pipeline(ort, config, student, decoder, encoders);
  }

  constructor(ort, config, student, decoder, encoders) {
    Object.assign(this, { ort, config, student, decoder, encoders, info: student.info });
  }

  get bytes() {
    return Object.values(this.config.files).reduce((sum, { bytes }) => sum + bytes, 0);
  }

  // The condition of a prompt, as pyard.runtime's PromptEncoder makes it.
  async encode(prompt) {
    const { tokens: layout, masked, pooled } = this.config.text;
    const found = {};
    let mask;
    for (const { settings, session, tokenizer } of this.encoders) {
      const { ids, given } = tokenNumbers(tokenizer, settings, prompt);
      const inputs = { input_ids: this.integers(ids), attention_mask: this.integers(given) };
      const feeds = Object.fromEntries(session.inputNames.map((name) => [name, inputs[name]]));
      const outputs = await session.run(feeds, settings.outputs);
      found[settings.name] = outputs;
      mask = given.slice(settings.dropped);
      if (outputs.tokens) outputs.tokens = rowsFrom(outputs.tokens, settings.dropped);
    }
    const rows = layout.map((row) => (typeof row[0] === 'string' ? beside(row.map((name) => found[name].tokens)) : zeros(row)));
    const width = Math.max(...rows.map((row) => row.width));
    const count = rows.reduce((sum, row) => sum + row.count, 0);
    const data = new Float32Array(count * width);
    let at = 0;
    for (const row of rows) {
      for (let i = 0; i < row.count; ++i, ++at) data.set(row.data.subarray(i * row.width, (i + 1) * row.width), at * width);
    }
    // Padding is zero, as in training, where the transformer does not attend to it.
    if (masked) mask.forEach((one, i) => one || data.fill(0, i * width, (i + 1) * width));
    else mask = new Array(count).fill(1);
    const tensors = {
      tokens: new this.ort.Tensor('float32', data, [1, count, width]),
      mask: new this.ort.Tensor('bool', Uint8Array.from(mask), [1, count]),
    };
    for (const [name, value] of Object.entries(this.config.constants)) {
      tensors[name] = new this.ort.Tensor('float32', Float32Array.of(value), [1]);
    }
    if (pooled.length) {
      const all = pooled.flatMap((name) => [...found[name].pooled.data]);
      tensors.pooled = new this.ort.Tensor('float32', Float32Array.from(all), [1, all.length]);
    }
    return Object.fromEntries(this.config.conditions.map(({ name }) => [name, tensors[name]]));
  }

  integers(numbers) {
    return new this.ort.Tensor('int64', BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
  }

  // As Student.draw, decoded.
  async *draw(condition, seed) {
    for await (const { step, picture, milliseconds } of this.student.draw(condition, seed)) {
      if (!this.decoder) {
        yield { step, picture, milliseconds };
        continue;
      }
      const begin = performance.now();
      const { image } = await this.decoder.run({ latent: picture });
      yield { step, picture: image, milliseconds: milliseconds + performance.now() - begin };
    }
  }
}

// Numbers of a prompt's tokens, and which of them are text and not padding.
export function tokenNumbers(tokenizer, settings, prompt) {
  const text = `${settings.prefix}${settings.plain ? prompt.toLowerCase().trim() : prompt}${settings.suffix}`;
  const numbers = truncated(tokenizer, text, settings.max_length);
  if (numbers.includes(undefined)) throw new Error(`the tokenizer has no token for a part of "${text}"`);
  const padding = Array(settings.pads_to === 'max_length' ? settings.max_length - numbers.length : 0);
  const [pads, none, ones] = [padding.fill(settings.pad), padding.slice().fill(0), numbers.map(() => 1)];
  return settings.pads_left
    ? { ids: [...pads, ...numbers], given: [...none, ...ones] }
    : { ids: [...numbers, ...pads], given: [...ones, ...none] };
}

// Text is cut to what leaves room for the special tokens around it.
function truncated(tokenizer, text, longest) {
  const { ids } = tokenizer.encode(text);
  if (ids.length <= longest) return ids;
  const bare = tokenizer.encode(text, { add_special_tokens: false }).ids;
  const before = ids.findIndex((_, start) => bare.every((id, i) => ids[start + i] === id));
  const after = ids.length - before - bare.length;
  return [...ids.slice(0, before), ...bare.slice(0, longest - before - after), ...ids.slice(before + bare.length)];
}

const zeros = ([count, width]) => ({ count, width, data: new Float32Array(count * width) });

function rowsFrom({ data, dims: [, count, width] }, first) {
  return { count: count - first, width, data: Float32Array.from(data.subarray(first * width)) };
}

// Outputs of several encoders for the same tokens, one vector behind the other.
function beside(parts) {
  const [{ count }] = parts;
  const width = parts.reduce((sum, part) => sum + part.width, 0);
  const data = new Float32Array(count * width);
  let at = 0;
  for (let i = 0; i < count; ++i) {
    for (const part of parts) {
      data.set(part.data.subarray(i * part.width, (i + 1) * part.width), at);
      at += part.width;
    }
  }
  return { count, width, data };
}

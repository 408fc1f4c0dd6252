// The page: loads the student that the server offers (?student=: a file, or the folder of a pipeline, which ends in a slash) or a chosen
// file, and draws what is asked for.

import { Student, toImage } from './student.js';

const LIBRARY = './node_modules/onnxruntime-web/dist/';
const MAX_BUTTONS = 20;
const $ = (id) => document.getElementById(id);

const place = new URLSearchParams(location.search).get('student') ?? 'student.onnx';
let chosenFile; // in place of what the server offers
let student; // or a pipeline
let label = 0;
let latest = 0; // number of the latest drawing: earlier ones stop

async function available() {
  const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const found = [['wasm', `WebAssembly, ${threads} ${threads === 1 ? 'thread' : 'threads'}`]];
  if (await navigator.gpu?.requestAdapter()) found.push(['webgpu', 'WebGPU']);
  return { found, threads };
}

// Each provider has a build of its own; that of WebGPU is twice as large.
async function library(provider) {
  const ort = await import(`${LIBRARY}ort.${provider}.bundle.min.mjs`);
  ort.env.wasm.numThreads = (await available()).threads;
  return ort;
}

async function read(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  return new Uint8Array(await answer.arrayBuffer());
}

async function open() {
  const provider = $('provider').value;
  const ort = await library(provider);
  let name = place;
  let size;
  if (!chosenFile && place.endsWith('/')) {
    const { Pipeline } = await import('./pipeline.js');
    student = await Pipeline.load(ort, (file) => read(place + file), provider);
    size = student.bytes;
  } else {
    const bytes = chosenFile ? new Uint8Array(await chosenFile.arrayBuffer()) : await read(place);
    student = await Student.load(ort, bytes, provider);
    [name, size] = [chosenFile?.name ?? place, bytes.length];
  }
  const { info } = student;
  $('about').textContent =
    `${name}: ${info.num_steps} steps, ${info.precision}, ${(size / 1e6).toFixed(1)} MB, samples of [${info.sample_shape.join(', ')}]`;
  const prompts = Boolean(student.encode);
  if (!prompts && info.num_classes === null) {
    const names = info.conditions.map(({ name }) => name).join(', ');
    throw new Error(`this file takes ${names}; to draw from prompts, export the student as a folder: --onnx FOLDER/`);
  }
  $('prompt-form').hidden = !prompts;
  $('classes').hidden = prompts;
  if (!prompts) showClasses(info.num_classes);
  $('controls').hidden = false;
}

function showClasses(count) {
  label = Math.min(label, count - 1);
  const numbers = [...Array(count).keys()];
  if (count <= MAX_BUTTONS) {
    $('classes').replaceChildren(...numbers.map((number) => {
      const button = Object.assign(document.createElement('button'), { type: 'button', textContent: number });
      button.onclick = () => choose(number);
      return button;
    }));
  } else {
    const input = Object.assign(document.createElement('input'), { type: 'number', min: 0, max: count - 1, value: label });
    input.onchange = () => choose(Math.max(0, Math.min(count - 1, Math.round(input.valueAsNumber) || 0)));
    $('classes').replaceChildren(`Class, 0 to ${count - 1}`, input);
  }
}

function choose(number) {
  label = number;
  draw();
}

function seed() {
  const text = $('seed').value.trim();
  if (!/^\d+$/.test(text) || BigInt(text) >= 2n ** 64n) throw new Error(`seed ${text}: expected 0 to 2**64 - 1`);
  return BigInt(text);
}

// A drawing that has begun stops after the step that runs, and what was asked for meanwhile is left out, but for the latest.
function draw() {
  const mine = ++latest;
  return next(() => mine === latest && drawAs(mine));
}

async function drawAs(mine) {
  for (const [number, button] of [...$('classes').querySelectorAll('button')].entries()) {
    button.setAttribute('aria-pressed', number === label);
  }
  const what = student.encode ? { prompt: $('prompt').value } : { label };
  const begin = performance.now();
  const condition = student.encode ? await student.encode(what.prompt) : student.label(label);
  $('timing').textContent = student.encode ? `Prompt encoded in ${(performance.now() - begin).toFixed(1)} ms.` : '';
  const count = student.info.form === 'sampler' ? 1 : student.info.num_steps;
  const figures = Array.from({ length: count }, (_, step) => figure(step, count));
  const predictions = [];
  for await (const { step, picture, milliseconds } of student.draw(condition, seed())) {
    if (mine !== latest) return;
    if (step === 0) $('steps').replaceChildren(...figures);
    const image = toImage(picture);
    const canvas = figures[step].querySelector('canvas');
    [canvas.width, canvas.height] = [image.width, image.height];
    canvas.style.aspectRatio = `${image.width} / ${image.height}`;
    canvas.getContext('2d').putImageData(image, 0, 0);
    figures[step].querySelector('span').textContent = `${milliseconds.toFixed(1)} ms`;
    predictions.push(picture);
    await new Promise(requestAnimationFrame); // let the browser paint before the next step
  }
  self.drawn = { ...what, seed: $('seed').value, predictions }; // for tests, and for the curious
}

function figure(step, count) {
  const element = document.createElement('figure');
  const caption = document.createElement('figcaption');
  caption.append(`step ${step + 1} of ${count}`, document.createElement('span'));
  element.append(document.createElement('canvas'), caption);
  return element;
}

// One thing after the other; whatever goes wrong is said on the page.
let queue = Promise.resolve();
function next(action) {
  queue = queue.then(async () => {
    $('message').textContent = '';
    try {
      await action();
    } catch (error) {
      console.error(error);
      $('message').textContent = error.message ?? String(error);
    }
  });
  return queue;
}

function reopen() {
  const mine = ++latest;
  return next(async () => {
    await open();
    await drawAs(mine);
  });
}

$('prompt-form').onsubmit = (event) => {
  event.preventDefault();
  draw();
};
$('seed').onchange = draw;
$('next-seed').onclick = () => {
  next(() => { $('seed').value = BigInt.asUintN(64, seed() + 1n); });
  draw();
};
$('provider').onchange = reopen;
$('file').onchange = () => {
  [chosenFile] = $('file').files;
  reopen();
};

$('provider').replaceChildren(...(await available()).found.map(([value, text]) => new Option(text, value)));
await reopen();

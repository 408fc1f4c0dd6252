// The page: loads the student that the server offers (or ?student=URL, or a chosen file), and draws what is clicked.

import { Student, toImage } from './student.js';

const LIBRARY = './node_modules/onnxruntime-web/dist/';
const MAX_BUTTONS = 20;
const $ = (id) => document.getElementById(id);

let bytes; // of the student's file
let student;
let chosen = 0; // class
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

async function fetchStudent(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  return new Uint8Array(await answer.arrayBuffer());
}

async function open(name) {
  student = await Student.load(await library($('provider').value), bytes, $('provider').value);
  const { info } = student;
  $('about').textContent =
    `${name}: ${info.num_steps} steps, ${info.precision}, ${(bytes.length / 1e6).toFixed(1)} MB, ` +
    `samples of [${info.sample_shape.join(', ')}]`;
  if (info.num_classes === null) throw new Error(`this page draws classes; the student takes ${conditionNames(info)}`);
  showClasses(info.num_classes);
  $('controls').hidden = false;
}

const conditionNames = (info) => info.conditions.map(({ name }) => name).join(', ');

function showClasses(count) {
  chosen = Math.min(chosen, count - 1);
  const numbers = [...Array(count).keys()];
  if (count <= MAX_BUTTONS) {
    $('classes').replaceChildren(...numbers.map((number) => {
      const button = Object.assign(document.createElement('button'), { type: 'button', textContent: number });
      button.onclick = () => choose(number);
      return button;
    }));
  } else {
    const input = Object.assign(document.createElement('input'), { type: 'number', min: 0, max: count - 1, value: chosen });
    input.onchange = () => choose(Math.max(0, Math.min(count - 1, Math.round(input.valueAsNumber) || 0)));
    $('classes').replaceChildren(`Class, 0 to ${count - 1}`, input);
  }
}

function choose(number) {
  chosen = number;
  return show(draw);
}

function seed() {
  const text = $('seed').value.trim();
  if (!/^\d+$/.test(text) || BigInt(text) >= 2n ** 64n) throw new Error(`seed ${text}: expected 0 to 2**64 - 1`);
  return BigInt(text);
}

async function draw() {
  const mine = ++latest;
  for (const [number, button] of [...$('classes').querySelectorAll('button')].entries()) {
    button.setAttribute('aria-pressed', number === chosen);
  }
  const count = student.info.form === 'sampler' ? 1 : student.info.num_steps;
  const figures = Array.from({ length: count }, (_, step) => figure(step, count));
  const predictions = [];
  for await (const { step, picture, milliseconds } of student.draw(student.label(chosen), seed())) {
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
  self.drawn = { label: chosen, seed: $('seed').value, predictions }; // for tests, and for the curious
}

function figure(step, count) {
  const element = document.createElement('figure');
  const caption = document.createElement('figcaption');
  caption.append(`step ${step + 1} of ${count}`, document.createElement('span'));
  element.append(document.createElement('canvas'), caption);
  return element;
}

// Whatever goes wrong is said on the page.
async function show(action) {
  $('message').textContent = '';
  try {
    await action();
  } catch (error) {
    console.error(error);
    $('message').textContent = error.message ?? String(error);
  }
}

const reopen = (name) => show(async () => {
  await open(name);
  await draw();
});

let name = new URLSearchParams(location.search).get('student') ?? 'student.onnx';
$('seed').onchange = () => show(draw);
$('next-seed').onclick = () => show(() => {
  $('seed').value = BigInt.asUintN(64, seed() + 1n);
  return draw();
});
$('provider').onchange = () => reopen(name);
$('file').onchange = () => show(async () => {
  const [file] = $('file').files;
  bytes = new Uint8Array(await file.arrayBuffer());
  name = file.name;
  await reopen(name);
});

await show(async () => {
  const { found } = await available();
  $('provider').replaceChildren(...found.map(([value, text]) => new Option(text, value)));
  bytes = await fetchStudent(name);
  await reopen(name);
});

// Drives the page in a headless Chromium: node draw_in_browser.mjs '{"puppeteer": FILE, "chromium": FILE, "url": URL, "draws": [[label,
// seed]], "provider": "wasm", "screenshot": FILE}'; prints what the page drew as one line of JSON.

const wanted = JSON.parse(process.argv[2]);
const { default: puppeteer } = await import(wanted.puppeteer);
const webgpu = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan'];
const browser = await puppeteer.launch({
  executablePath: wanted.chromium,
  args: ['--no-sandbox', '--disable-dev-shm-usage', ...(wanted.provider === 'webgpu' ? webgpu : [])],
});
const found = { errors: [], requests: [], drawn: [] };
try {
  const page = await browser.newPage();
  await page.setViewport({ width: 960, height: 560, deviceScaleFactor: 1 });
  page.on('pageerror', (error) => found.errors.push(String(error)));
  page.on('console', (message) => message.type() === 'error' && found.errors.push(message.text()));
  page.on('request', (request) => found.requests.push(request.url()));
  await page.goto(wanted.url);
  const settled = () => page.waitForFunction(
    () => self.drawn || document.getElementById('message').textContent, { timeout: 120000 });
  await settled();
  found.providers = await page.$$eval('#provider option', (options) => options.map(({ value }) => value));
  if (wanted.provider && found.providers.includes(wanted.provider)) {
    await page.evaluate(() => { delete self.drawn; });
    await page.select('#provider', wanted.provider);
    await settled();
  }
  for (const [label, seed] of wanted.draws) {
    await page.evaluate((text) => {
      delete self.drawn;
      document.getElementById('seed').value = text;
    }, seed);
    await page.evaluate((number) => [...document.querySelectorAll('#classes button')][number].click(), label);
    await settled();
    found.drawn.push(await page.evaluate(() => ({
      label: self.drawn.label,
      seed: self.drawn.seed,
      predictions: self.drawn.predictions.map(({ dims, data }) => ({ dims, data: [...data] })),
      canvases: [...document.querySelectorAll('canvas')].map((canvas) => [
        ...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]),
    })));
  }
  found.captions = await page.$$eval('figcaption', (all) => all.map(({ innerText }) => innerText));
  found.isolated = await page.evaluate(() => self.crossOriginIsolated);
  found.about = await page.$eval('#about', ({ textContent }) => textContent);
  found.message = await page.$eval('#message', ({ textContent }) => textContent);
  if (wanted.screenshot) await page.screenshot({ path: wanted.screenshot });
} finally {
  await browser.close();
}
console.log(JSON.stringify(found));

// The example page in a headless Chromium, told what to draw: node draw_in_browser.mjs PUPPETEER CHROMIUM URL. Each line of the input is
// [prompt, seed]; each line of the output has the picture, float32 from -1 to 1, and the milliseconds that the page shows.
import { createInterface } from 'node:readline';

const [puppeteerFile, executablePath, url] = process.argv.slice(2);
const { default: puppeteer } = await import(puppeteerFile);
const browser = await puppeteer.launch({ executablePath, args: ['--no-sandbox', '--disable-dev-shm-usage'] });
try {
  const page = await browser.newPage();
  await page.goto(url);
  const settled = () => page.waitForFunction(
    () => self.drawn || document.getElementById('message').textContent, { timeout: 120000 });
  await settled();
  const threads = await page.evaluate(() => (self.crossOriginIsolated ? navigator.hardwareConcurrency : 1));
  console.log(JSON.stringify({ browser: await browser.version(), threads }));
  for await (const line of createInterface({ input: process.stdin })) {
    const [prompt, seed] = JSON.parse(line);
    await page.evaluate((what, number) => {
      delete self.drawn;
      document.getElementById('seed').value = number;
      document.getElementById('prompt').value = what;
      document.querySelector('#prompt-form button').click();
    }, prompt, String(seed));
    await settled();
    console.log(JSON.stringify(await page.evaluate(() => {
      const shown = [document.getElementById('timing'), ...document.querySelectorAll('figcaption span')];
      const milliseconds = shown.map(({ textContent }) => parseFloat(textContent.match(/[\d.]+(?= ms)/)[0]));
      const last = self.drawn.predictions.at(-1);
      return { milliseconds: milliseconds.reduce((a, b) => a + b), dims: last.dims, data: [...last.data] };
    })));
  }
} finally {
  await browser.close();
}

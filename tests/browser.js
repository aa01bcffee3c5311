// node browser.js CHROMIUM LIBRARIES FOLDER PAGE…: what a browser sees of local pages, as lines of JSON.
const puppeteer = require("puppeteer-core");

const [chromium, libraries, folder, ...pages] = process.argv.slice(2);
const args = ["--no-sandbox", "--single-process", "--no-zygote", "--disable-dev-shm-usage", "--use-gl=angle",
  "--use-angle=swiftshader", "--in-process-gpu", "--disable-extensions"];

async function seen(browser, page, width, scheme) {
  const tab = await browser.newPage(), asked = [], said = [];
  tab.on("request", request => { if (!/^(file|data):/.test(request.url())) asked.push(request.url()); });
  tab.on("pageerror", error => said.push(error.message));
  tab.on("console", message => { if (message.type() === "error") said.push(message.text()); });
  await tab.setViewport({ width, height: 900 });
  await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await tab.goto("file://" + page, { waitUntil: "load" });
  const found = await tab.evaluate(() => {
    const search = document.querySelector("input.search-table"), rows = [...document.querySelectorAll("tbody tr")];
    let left = null;
    if (search) {
      search.value = "householder";
      search.dispatchEvent(new Event("input"));
      left = rows.filter(row => !row.hidden).map(row => row.textContent.trim().split(/\s+/)[0]);
    }
    const pictures = [...document.images].map(image => image.complete && image.naturalWidth > 0);
    const background = getComputedStyle(document.body).backgroundColor, ink = getComputedStyle(document.body).color;
    return { wide: document.documentElement.scrollWidth, left, pictures, background, ink,
      formulas: document.querySelectorAll("math").length };
  });
  await tab.screenshot({ path: `${folder}/${page.split("/").pop()}-${width}-${scheme}.png`, fullPage: true });
  await tab.close();
  console.log(JSON.stringify({ page, width, scheme, asked, said, ...found }));
}

(async () => {
  const env = { ...process.env, LD_LIBRARY_PATH: libraries, HOME: folder };
  const browser = await puppeteer.launch({ executablePath: chromium, headless: "shell", args, env });
  for (const page of pages)
    for (const width of [1200, 390])
      for (const scheme of ["light", "dark"]) await seen(browser, page, width, scheme);
  await browser.close();
})().catch(error => { console.error(error); process.exit(1); });

#!/usr/bin/env node
// Opens workflows in the real ComfyUI page with Chromium and reports what a person would see.
//
// usage: frontend.mjs URL < jobs.json
//
// jobs.json is a list of {"name", "workflow", "screenshot"?, "save"?, "note"?, "extra"?}:
//   workflow    the graph itself; API format is imported and laid out by the page
//   screenshot  PNG file to write
//   save        file that receives the graph in UI format, seeds fixed
//   note        Markdown shown beside the saved graph
//   extra       entries for the "extra" of the saved graph
// One JSON line per job goes to stdout: {"name", "problems": [...], "prompt": the graph the page would queue}.
//
// Environment: BROWSER_DIR (folder with node_modules/playwright-core), CHROMIUM (default: chromium on the PATH).
import fs from 'node:fs'
import path from 'node:path'
import { createRequire } from 'node:module'

const modules = path.resolve(process.env.BROWSER_DIR ?? '.comfy/browser', 'node_modules', 'x.js')
const { chromium } = createRequire(modules)('playwright-core')
const onPath = (process.env.PATH ?? '').split(':').map((d) => path.join(d, 'chromium')).find((f) => fs.existsSync(f))
const url = process.argv[2]
const jobs = JSON.parse(fs.readFileSync(0, 'utf8'))
const VIRTUAL = ['Note', 'MarkdownNote', 'Reroute', 'PrimitiveNode']
const TIMEOUT = 120_000

const isLocal = (u) => /^(data|blob):|^(https?|wss?):\/\/(127\.0\.0\.1|localhost)[:/]/.test(u)

// Noise that every start of this frontend makes on a machine without internet and with a fresh profile.
function isKnownNoise(text, where) {
  return (where && !isLocal(where)) ||
    (/net::ERR_FAILED|ERR_BLOCKED_BY_CLIENT|Content Security Policy/.test(text) && !/127\.0\.0\.1.*violates/.test(text)) ||
    /ComfyApp graph accessed before initialization/.test(text) ||
    (/ 404 /.test(text) && /\/user\.css|\/api\/userdata|\/docs\//.test(where))
}

function watch(page, problems) {
  page.on('pageerror', (e) => problems.push(`page error: ${e.message}`))
  page.on('console', (m) => {
    const where = m.location().url
    if (m.type() === 'error' && !isKnownNoise(m.text(), where)) problems.push(`console: ${m.text().slice(0, 300)} ${where}`)
  })
  page.on('response', (r) => {
    if (isLocal(r.url()) && r.status() >= 500) problems.push(`HTTP ${r.status()}: ${r.url()}`)
  })
}

async function openPage(browser, problems) {
  const page = await browser.newPage({ viewport: { width: 1600, height: 1000 } })
  await page.route((u) => !isLocal(u.href), (r) => r.abort())
  watch(page, problems)
  // A fresh profile would get the template browser over the canvas, a map over the graph, and no text in small nodes.
  const settings = [
    ['Comfy.TutorialCompleted', 'true'],
    ['Comfy.Minimap.Visible', 'false'],
    ['LiteGraph.Canvas.MinFontSizeForLOD', '0']
  ]
  for (const [name, value] of settings) {
    await fetch(new URL(`/settings/${name}`, url), { method: 'POST', body: value })
  }
  await page.goto(url, { waitUntil: 'domcontentloaded', timeout: TIMEOUT })
  await page.waitForFunction(() => Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100 &&
    window.app?.extensionManager && document.querySelector('#graph-canvas') && !document.querySelector('#splash-loader'),
  null, { timeout: TIMEOUT })
  // The page starts with a graph of its own and looks for its models, which are not here: let it finish, and clear it.
  await page.waitForLoadState('networkidle', { timeout: TIMEOUT })
  await page.evaluate(() => window.app.loadGraphData({ version: 0.4, nodes: [], links: [] }))
  await page.waitForTimeout(1000)
  return page
}

// Everything the page shows as a complaint: dialogs, and the overlay that lists missing nodes and refused inputs.
async function complaints(page) {
  const boxes = page.locator('[role=dialog]:visible, [role=alertdialog]:visible, [data-testid=error-overlay]:visible')
  return (await boxes.allInnerTexts()).map((t) => `shown to the user: ${t.replace(/\s+/g, ' ').trim().slice(0, 400)}`)
}

async function load(page, { name, workflow }) {
  const isApi = !Array.isArray(workflow.nodes)
  const types = (isApi ? Object.values(workflow).map((n) => n.class_type) : workflow.nodes.map((n) => n.type))
    .filter((t) => !VIRTUAL.includes(t))
  const problems = []
  const missing = await page.evaluate((t) => t.filter((x) => !(x in window.LiteGraph.registered_node_types)), [...new Set(types)])
  if (missing.length) problems.push(`missing node types: ${missing.join(', ')}`)
  await page.evaluate(async ({ workflow, name, isApi }) => {
    await (isApi ? window.app.loadApiJson(workflow, name) : window.app.loadGraphData(workflow, true, true, name))
  }, { workflow, name, isApi })
  await page.waitForTimeout(700)
  const loaded = await page.evaluate(() => window.app.graph.nodes.map((n) => ({ type: n.type, faulty: !!n.has_errors })))
  const expected = isApi ? Object.keys(workflow).length : workflow.nodes.length
  if (loaded.length !== expected) problems.push(`${loaded.length} of ${expected} nodes loaded`)
  problems.push(...loaded.filter((n) => n.faulty).map((n) => `node marked as faulty: ${n.type}`))
  return problems.concat(await complaints(page))
}

// The page rolls seeds after a run unless told otherwise; a shipped workflow keeps its seed.
async function serialize(page, { note, extra }) {
  return page.evaluate(({ note, extra }) => {
    const { graph } = window.app
    for (const n of graph.nodes) for (const w of n.widgets ?? []) if (w.name === 'control_after_generate') w.value = 'fixed'
    if (note) {
      const left = Math.min(...graph.nodes.map((n) => n.pos[0])), top = Math.min(...graph.nodes.map((n) => n.pos[1]))
      const node = window.LiteGraph.createNode('MarkdownNote')
      node.title = 'About this workflow'
      graph.add(node)
      node.widgets[0].value = note
      node.size = [420, 380]
      node.pos = [left - 460, top]
    }
    const saved = graph.serialize()
    return { ...saved, extra: { ...saved.extra, ...extra } }
  }, { note, extra })
}

// The page's own "fit view" hides a part behind its side bar.
async function screenshot(page, file) {
  await page.evaluate(() => {
    const { canvas, graph } = window.app
    const [side, top, margin] = [70, 90, 40]
    const boxes = graph.nodes.map((n) => n.getBounding())
    const left = Math.min(...boxes.map((b) => b[0])), right = Math.max(...boxes.map((b) => b[0] + b[2]))
    const upper = Math.min(...boxes.map((b) => b[1])), lower = Math.max(...boxes.map((b) => b[1] + b[3]))
    const [width, height] = [window.innerWidth - side - 2 * margin, window.innerHeight - top - 2 * margin]
    const scale = Math.min(width / (right - left), height / (lower - upper), 1.2)
    canvas.ds.scale = scale
    canvas.ds.offset = [
      (side + margin + (width - scale * (right - left)) / 2) / scale - left,
      (top + margin + (height - scale * (lower - upper)) / 2) / scale - upper
    ]
    canvas.setDirty(true, true)
  })
  await page.waitForTimeout(1200)
  fs.mkdirSync(path.dirname(file), { recursive: true })
  await page.screenshot({ path: file })
}

async function run(page, job, problems) {
  const result = { name: job.name, problems: [], prompt: null }
  try {
    let found = await load(page, job)
    if (found.length) {
      // On a busy machine the page may still complain about the graph before this one; a real fault comes back.
      await page.waitForTimeout(3000)
      found = await load(page, job)
    }
    result.problems.push(...found)
    if (job.save) fs.writeFileSync(job.save, JSON.stringify(await serialize(page, job), null, 2) + '\n')
    result.prompt = await page.evaluate(async () => (await window.app.graphToPrompt()).output)
    if (job.screenshot) await screenshot(page, job.screenshot)
  } catch (e) {
    result.problems.push(`${e.name}: ${e.message.split('\n')[0]}`)
  }
  result.problems = [...new Set([...result.problems, ...problems.splice(0)])]
  console.log(JSON.stringify(result))
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? onPath,
  args: ['--no-sandbox', '--disable-dev-shm-usage', '--use-gl=angle', '--use-angle=swiftshader']
})
try {
  const problems = []
  const page = await openPage(browser, problems)
  for (const job of jobs) await run(page, job, problems)
} finally {
  await browser.close()
}

// Called by .ci/conformance: `node conformance.mjs SUITE PROXY-PORT run|show [ID...]` runs the tests of
// http-cache-tests (with IDs: only those) against a proxy, and prints a JSON list of results;
// `show` prints each request and response as well.
import http from 'node:http'
import path from 'node:path'
import { pathToFileURL } from 'node:url'

const [suite, proxyPort, mode, ...ids] = process.argv.slice(2)
const load = name => import(pathToFileURL(path.join(suite, name)).href)
const print = console.log
if (mode === 'run') console.log = console.error // warnings of the suite

const { determineTestResult } = await load('lib/display.mjs')
const { runTests, getResults } = await load('client/runner.mjs')
const handlers = {
  config: (await load('server/handle-config.mjs')).default,
  state: (await load('server/handle-state.mjs')).default,
  test: (await load('server/handle-test.mjs')).default
}
// tests/surrogate-control.mjs is not in this list: only a reverse proxy obeys that field.
const groups = (await load('tests/index.mjs')).default

// The suite adds these fields to each request for its own use. The proxy does not know them, so it would
// treat every request as private to its client. They travel in User-Agent instead, which the proxy forwards,
// and the origin restores them. A request that the proxy makes by itself may lack them: then the suite counts
// the requests at the origin instead.
const SUITE_FIELDS = new Set(['test-name', 'test-id', 'req-num'])
const USER_AGENT = 'http-cache-tests '

function packSuiteFields (headers) {
  const packed = headers.filter(([name]) => SUITE_FIELDS.has(name.toLowerCase()))
  const others = headers.filter(([name]) => !SUITE_FIELDS.has(name.toLowerCase()))
  return [...others, ['User-Agent', USER_AGENT + encodeURIComponent(JSON.stringify(packed))]]
}

function restoreSuiteFields (request) {
  const agent = request.headers['user-agent'] || ''
  if (!agent.startsWith(USER_AGENT)) return
  for (const [name, value] of JSON.parse(decodeURIComponent(agent.slice(USER_AGENT.length)))) {
    request.headers[name.toLowerCase()] = value
  }
}

// The suite's server/server.mjs listens on all addresses; these are its handlers on loopback. Each test
// has an origin of its own: the proxy remembers for a while that an origin has failed, and some tests make
// it fail.
const origins = new Map()
async function originFor (token) {
  if (!origins.has(token)) {
    const server = http.createServer((request, response) => {
      const [, name, ...segments] = new URL(request.url, 'http://origin/').pathname.split('/')
      restoreSuiteFields(request)
      handlers[name](segments, request, response)
    })
    origins.set(token, new Promise(resolve => server.listen(0, '127.0.0.1', () => resolve(server))))
  }
  return `127.0.0.1:${(await origins.get(token)).address().port}`
}

// fetch() as a client with http_proxy set does it: absolute-form to the proxy, Host of the origin.
// Redirects are not followed: the tests look at them.
async function fetchThroughProxy (pathname, { method = 'GET', headers = [], body } = {}) {
  const authority = await originFor(pathname.split(/[/?]/)[2])
  const fields = { Host: authority, Accept: '*/*' }
  for (const [name, value] of packSuiteFields(headers)) fields[name] = fields[name] ? [fields[name], value].flat() : value
  return new Promise((resolve, reject) => {
    const request = http.request({
      host: '127.0.0.1',
      port: proxyPort,
      method,
      path: `http://${authority}${pathname}`,
      headers: fields,
      agent: false,
      timeout: 30000
    })
    request.on('error', reject)
    request.on('timeout', () => request.destroy(new Error('no answer in 30 s')))
    request.on('response', response => {
      const received = new Headers()
      for (let i = 0; i < response.rawHeaders.length; i += 2) {
        received.append(response.rawHeaders[i], response.rawHeaders[i + 1])
      }
      const chunks = []
      response.on('error', reject)
      response.on('data', chunk => chunks.push(chunk))
      response.on('end', () => resolve({
        status: response.statusCode,
        statusText: response.statusMessage,
        headers: received,
        text: async () => Buffer.concat(chunks).toString()
      }))
    })
    request.end(body)
  })
}

const chosen = groups.map(group => ({
  ...group, tests: group.tests.filter(test => ids.length === 0 || ids.includes(test.id))
}))
chosen.forEach(group => group.tests.forEach(test => { test.dump = mode === 'show' }))
// The suite's default is 100 tests at once. Half of them leave a busy machine the time to answer before
// what lives for 2 s is stale.
await runTests(chosen, fetchThroughProxy, false, '', 50)

// The suite's own judgement, by the symbol that it prints.
const words = { '✅': 'pass', Y: 'yes', N: 'no', '-': 'not run', '⚪️': 'dependency failed', '🔹': 'setup failed', '↻': 'retried' }
const results = getResults()
const report = chosen.flatMap(group => group.tests.map(test => ({
  id: test.id,
  kind: test.kind || 'required',
  depends: test.depends_on || [],
  result: words[determineTestResult(groups, test.id, results, mode === 'run')[2]] || 'failed',
  detail: results[test.id] instanceof Array ? results[test.id].join(': ') : ''
})))
print(JSON.stringify(report, null, 1))
process.exit()

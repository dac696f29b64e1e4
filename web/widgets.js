// What a node's widgets show: a word such as "auto" for the value that leaves a choice to the pack, and no more widgets
// than are needed. nodes/page/schema.py notes in each input's options: `shown_as` (a value, and the word for it),
// `advanced`, and `only_with` (the value that another widget must have). Values stay what they are.
import { app } from "../../scripts/app.js"
import { ALWAYS, drawAgain, pageKnowsAdvanced, setting, texts } from "./page.js"

const GAP = 4 // pixels between two widgets
const BADGE = 100 // pixels that the first Nodes 2.0 need for the pack's name, next to a title
const OURS = /^Ascend[A-Z]/
const STATE = "showAdvanced" // the property of a node, which is saved

const inputsOf = node => {
    const { required, optional } = node.constructor.nodeData?.input ?? {}
    return { ...required, ...optional }
}
const optionsOf = (node, { name }) => inputsOf(node)[name]?.[1] ?? {}
const isLinked = (node, { name }) => node.inputs?.some(input => input.widget?.name === name && input.link != null)

function isDefault(node, widget) {
    const [form, options] = inputsOf(node)[widget.name]
    return widget.value === (options.default ?? (Array.isArray(form) ? form : options.options)?.[0])
}

// ---- words for values

// The classic canvas draws a number's `_displayValue`. It is changed in the class, because copies of a widget that stand
// at a subgraph have its options, but nothing else of it; and in the widget, as newer pages copy it there.
function showWordsOf(holder) {
    const drawn = Object.getOwnPropertyDescriptor(holder, "_displayValue")
    if (!drawn?.get || drawn.get.knowsWords) return
    const get = function () {
        const shown = this.options?.shown_as
        const isWord = shown && this.value === shown.value && !this.computedDisabled
        return isWord ? texts("widgets")[shown.word] : drawn.get.call(this)
    }
    get.knowsWords = true
    Object.defineProperty(holder, "_displayValue", { ...drawn, get })
}

function showWord(widget, shown) {
    if (typeof shown.value === "boolean") {
        widget.options.off = texts("widgets")[shown.word]
        widget.options.on = texts("widgets").on
    }
    // Not enumerable, because some pages write all enumerable options into the document.
    Object.defineProperty(widget.options, "shown_as", { value: shown, configurable: true })
    if (widget.type === "number") [widget.constructor.prototype, widget].forEach(showWordsOf)
}

// Nodes 2.0 draw numbers as inputs of the document, and no extension can say what is in them: a style sheet lays the
// word over those whose value has one, until the user types there. The first ones (PrimeVue's) show no word for a switch.
const sheet = document.head.appendChild(document.createElement("style"))
const LOOK = "position: absolute; inset: 0; display: flex; align-items: center; pointer-events: none; padding-left: 4px"
const OF_PRIMEVUE = `
    .lg-node-widget .p-inputnumber::after { padding-left: 42px !important; font-size: 14px }
    .p-toggleswitch[off]::before { content: attr(off); position: absolute; right: 100%;
        margin-right: 8px; font-size: 12px; white-space: nowrap }
    .p-toggleswitch[off][data-p-checked="true"]::before { content: attr(on) }`
let waits = false

function everyNode() {
    const root = app.graph?.rootGraph ?? app.graph
    return [root, ...(root?.subgraphs?.values() ?? [])].flatMap(graph => graph?.nodes ?? [])
}

function rulesFor(node, { name, options: { shown_as: { value, word } } }) {
    const row = `[data-node-id="${node.id}"] .lg-node-widget:has([aria-label="${CSS.escape(name)}"]):not(:focus-within)`
    const input = `input[aria-valuenow="${value}"]`
    return `${row} ${input} { color: transparent !important }
        ${row} :has(> ${input}) { position: relative }
        ${row} :has(> ${input})::after { content: "${texts("widgets")[word]}"; ${LOOK} }`
}

function writeSheet() {
    waits = false
    sheet.textContent = OF_PRIMEVUE + everyNode().flatMap(node => (node.widgets ?? [])
        .filter(({ options }) => typeof options?.shown_as?.value === "number")
        .map(widget => rulesFor(node, widget))).join("\n")
}

function writeSheetSoon() {
    if (!waits) requestAnimationFrame(writeSheet)
    waits = true
}

// ---- which widgets are shown

// Hides inputs that count only with another widget's value, and, until the user asks for them, those that most people
// never touch. What is linked or was changed stays.
function arrange(node) {
    const always = pageKnowsAdvanced() && setting(ALWAYS)
    let count = 0
    for (const widget of node.widgets ?? []) {
        const { advanced, only_with } = optionsOf(node, widget)
        if (!advanced && !only_with) continue
        const linked = isLinked(node, widget)
        const other = only_with && node.widgets.find(({ name }) => name === only_with.widget)
        const unused = Boolean(other && !linked && other.value !== only_with.value)
        const onRequest = Boolean(advanced && !always && !linked && isDefault(node, widget))
        widget.options.advanced = onRequest // for a button of the page in Nodes 2.0
        widget.advanced = onRequest // for the canvas' menu
        hide(widget, unused || (onRequest && !node.showAdvanced))
        count += onRequest
    }
    if (node.advancedButton) label(node.advancedButton, node.showAdvanced, count)
}

function hide(widget, hidden) {
    widget.options.hidden = hidden // for Nodes 2.0
    widget.hidden = hidden // for the classic canvas
    if (hidden) widget.computeSize = () => [0, -GAP] // older pages keep the place of a hidden widget
    else delete widget.computeSize
}

function label(button, shown, count) {
    button.label = shown ? texts("widgets").less : texts("widgets").more(count)
    if (!pageKnowsAdvanced()) button.name = button.label // the first Nodes 2.0 show a button's name
    hide(button, !count)
}

// Arranges a node on the canvas after a change. Its height follows; height that the user added stays.
function rearrange(node, change = () => {}) {
    const shown = () => (node.widgets ?? []).map(({ hidden, label }) => [hidden, label]).join()
    const [before, least] = [shown(), node.computeSize()[1]]
    change()
    arrange(node)
    if (shown() === before) return
    const needed = node.computeSize()[1]
    node.setSize([node.size[0], needed + Math.max(0, node.size[1] - least)])
    drawAgain(node)
    node.setDirtyCanvas?.(true, true)
}

// The width at which a title is not cut.
const pen = document.createElement("canvas").getContext("2d")

function widthOf(node) {
    pen.font = `${LiteGraph.NODE_TEXT_SIZE}px Arial`
    const badge = LiteGraph.vueNodesMode && !pageKnowsAdvanced() ? BADGE : 0
    const title = 1.2 * pen.measureText(node.title).width // for wider fonts
    return Math.max(node.size[0], Math.ceil(title) + 2 * LiteGraph.NODE_TITLE_HEIGHT + badge)
}

function addButton(node) {
    const toggle = () => (node.showAdvanced = !node.showAdvanced)
    const options = { serialize: false, canvasOnly: pageKnowsAdvanced() } // such a page has its own in Nodes 2.0
    node.advancedButton = node.addWidget("button", "advanced", null, toggle, options)
    node.advancedButton.serialize = false
}

// Whoever changes `showAdvanced` (our button, the page's button or menu) has the node rearranged. Some pages have made
// the property one that they watch themselves, of the node or of its class.
function watchAdvanced(node) {
    const place = [node, window.LGraphNode?.prototype ?? {}].find(one => Object.getOwnPropertyDescriptor(one, STATE)?.set)
    const watched = place && Object.getOwnPropertyDescriptor(place, STATE)
    let own = node[STATE]
    Object.defineProperty(node, STATE, {
        configurable: true,
        enumerable: true,
        get: () => (watched ? watched.get.call(node) : own),
        set: value => rearrange(node, () => (watched ? watched.set.call(node, value) : (own = value))),
    })
}

function watch(node, widget) {
    const { callback } = widget
    widget.callback = function () {
        const result = callback?.apply(this, arguments)
        rearrange(node)
        return result
    }
}

app.registerExtension({
    name: "AscendVideo.Widgets",
    nodeCreated(node) {
        if (!OURS.test(node.comfyClass ?? "")) return
        const inputs = Object.values(inputsOf(node)).map(([, options]) => options ?? {})
        const others = inputs.map(({ only_with }) => only_with?.widget)
        for (const widget of node.widgets ?? []) {
            const { shown_as } = optionsOf(node, widget)
            if (shown_as) showWord(widget, shown_as)
            if (others.includes(widget.name)) watch(node, widget)
        }
        if (inputs.some(({ advanced }) => advanced)) {
            watchAdvanced(node)
            addButton(node)
        }
        arrange(node)
        node.setSize([widthOf(node), node.computeSize()[1]])
        writeSheetSoon()
    },
    beforeRegisterNodeDef(nodeType, { name }) {
        if (!OURS.test(name)) return
        const { onConfigure, onConnectionsChange, onAdded } = nodeType.prototype
        nodeType.prototype.onConfigure = function ({ size, [STATE]: shown } = {}) {
            onConfigure?.apply(this, arguments)
            arrange(this) // with the size that was saved
            if (shown && size) this.setSize([...size]) // which already has what setting STATE has added to it just now
        }
        nodeType.prototype.onConnectionsChange = function () {
            onConnectionsChange?.apply(this, arguments)
            if (!app.configuringGraph) rearrange(this)
        }
        nodeType.prototype.onAdded = function () {
            onAdded?.apply(this, arguments)
            writeSheetSoon()
        }
    },
    afterConfigureGraph: writeSheetSoon,
})

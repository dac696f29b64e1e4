// Shows what a node has to say of its last run: a sampler, how the ranks shared the work, what it took and what was saved;
// Ascend VAE Decode, what the whole video took; Ascend Text Encode, where a prompt was cut. ComfyUI's page removes a text
// that was sent while a job ran once it ends; what a node puts out (nodes/report/) stays. It has the text in all languages.
import { app } from "../../scripts/app.js"
import { drawAgain, setting } from "./page.js"

const HEIGHTS = { // pixels at least; a line takes about 14
    AscendSampler: 96, AscendSamplerAdvanced: 96, AscendVAEDecode: 52, AscendTextEncode: 64,
}
const MOST = 200 // pixels; what is longer can be scrolled
const SIDES = 32 // pixels of a node's width that a report does not have
const EDGES = 20 // pixels above and below it in the classic canvas
const LOOK = "overflow-y: auto; white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; padding: 4px 8px;" +
    "color: var(--input-text); background: var(--comfy-input-bg); font-size: 11px; line-height: 1.3;" +
    "border-radius: 4px; box-sizing: border-box;"
const WIDGET = "report"
const LIVE_TEXT = "$$node-text-preview" // the page's widget with the text that was sent while a job ran

// The text of an output in the page's language, or in English.
function textOf(output) {
    const language = `${setting("Comfy.Locale") ?? "en"}`.slice(0, 2)
    return (output.ascend_report?.map(texts => texts[language] ?? texts.en) ?? output.text).join("\n")
}

function heightOf(node, text) {
    const copy = document.body.appendChild(document.createElement("div"))
    copy.style.cssText = `${LOOK} position: absolute; visibility: hidden; width: ${node.size[0] - SIDES}px`
    copy.textContent = text
    const height = copy.offsetHeight + EDGES
    copy.remove()
    return Math.min(MOST, Math.max(HEIGHTS[node.type], height))
}

function addReport(node) {
    const element = document.createElement("div")
    element.className = "ascend-report"
    element.style.cssText = LOOK
    element.addEventListener("wheel", event => event.stopPropagation()) // scrolls the text, not the canvas
    const widget = node.addDOMWidget(WIDGET, "ascend-report", element, {
        serialize: false, // of the prompt
        getMinHeight: () => widget.reportHeight ?? HEIGHTS[node.type],
        getMaxHeight: () => widget.reportHeight ?? HEIGHTS[node.type],
        getValue: () => element.textContent,
        setValue: text => (element.textContent = text),
    })
    widget.serialize = false // of the saved workflow
    return widget
}

// Writes the text, and makes the node as high as it takes.
function write(node, widget, text) {
    const height = heightOf(node, text)
    const changed = height !== widget.reportHeight
    widget.reportHeight = height
    widget.value = text
    if (!changed) return
    widget.element.style.maxHeight = `${height}px`
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])])
    requestAnimationFrame(() => drawAgain(node))
}

// Some pages leave it there; the report says the same.
function removeLiveText(node) {
    const place = node.widgets?.findIndex(({ name }) => name === LIVE_TEXT) ?? -1
    if (place < 0) return
    node.widgets[place].onRemove?.()
    node.widgets.splice(place, 1)
}

function showReport(node, output) {
    if (!(node?.type in HEIGHTS) || !output?.text) return
    const text = textOf(output)
    const shown = node.widgets?.find(({ name }) => name === WIDGET)
    if (!text && !shown) return // most prompts have nothing to be said of
    removeLiveText(node)
    write(node, shown ?? addReport(node), text)
    node.setDirtyCanvas(true)
}

app.registerExtension({
    name: "AscendVideo.Report",
    beforeRegisterNodeDef(nodeType, { name }) {
        if (!(name in HEIGHTS)) return
        const { onExecuted } = nodeType.prototype
        nodeType.prototype.onExecuted = function (output) {
            onExecuted?.apply(this, arguments)
            showReport(this, output)
        }
    },
    // A workflow is shown again: from another tab, or from the list of what was run.
    onNodeOutputsUpdated(outputs) {
        for (const [id, output] of Object.entries(outputs)) showReport(app.graph.getNodeById(id), output)
    },
})

// Search words of nodes (`search_aliases`, from nodes/page/schema.py) for pages that search only the nodes' names: their
// search gets one more key.
import { app } from "../../scripts/app.js"
import { store } from "./page.js"

const KEY = "search_aliases"
const OPTIONS = { includeScore: true, threshold: 0.3, shouldSort: false, useExtendedSearch: true } // as the page's own

function withAliases(fuse) {
    if (!fuse?.keys || fuse.keys.includes(KEY)) return fuse
    const fuseOptions = { ...OPTIONS, keys: [...fuse.keys, KEY] }
    return new fuse.constructor(fuse.data, { fuseOptions, createIndex: true, advancedScoring: fuse.advancedScoring })
}

app.registerExtension({
    name: "AscendVideo.Search",
    setup() {
        const service = store("nodeDef")?.nodeSearchService
        const prototype = service && Object.getPrototypeOf(service)
        if (!prototype?.searchNode) return
        const { searchNode } = prototype
        prototype.searchNode = function () {
            this.nodeFuseSearch = withAliases(this.nodeFuseSearch)
            return searchNode.apply(this, arguments)
        }
    },
})

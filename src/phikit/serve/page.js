// Small things that the toolkit leaves to a page: light or dark, the address, side panels on phones.
"use strict";

const THEME = "phikit-theme";

function applyTheme() {
  const chosen = localStorage.getItem(THEME);
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.body.classList.toggle("dark", dark);
}

// The address names the conversation, so that a reload and a bookmark find it again.
function nameConversation() {
  const links = document.querySelector("#links");
  if (!links?.textContent.trim()) return; // the page is still being made
  const href = links.querySelector("a")?.getAttribute("href") ?? "";
  const id = href.match(/talks\/(\w+)\./)?.[1];
  const address = new URL(location.href);
  if (address.searchParams.get("c") === (id ?? null)) return;
  if (id) address.searchParams.set("c", id);
  else address.searchParams.delete("c");
  history.replaceState(null, "", address);
}

addEventListener("click", (event) => {
  if (event.target.closest("#theme")) {
    localStorage.setItem(THEME, document.body.classList.contains("dark") ? "light" : "dark");
    applyTheme();
  }
  if (event.target.closest("#talks label, #new")) leavePanel();
});

// On a phone a side panel covers the page: it begins closed, and closes when it has done its work.
function leavePanel() {
  const panel = document.querySelector("#talks-panel.open");
  if (innerWidth < 769) panel?.querySelector(".toggle-button").click();
}

// A copied reply goes without the line of figures below it.
if (navigator.clipboard) {
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  navigator.clipboard.writeText = (text) =>
    write(text.replace(/\s*<span class="figures">[^<]*<\/span>/g, ""));
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
let isBuilt = false;
new MutationObserver(() => {
  nameConversation();
  if (isBuilt || !document.querySelector("#talks-panel .toggle-button")) return;
  isBuilt = true;
  setTimeout(() => (applyTheme(), leavePanel()));
}).observe(document.body, { childList: true, subtree: true });

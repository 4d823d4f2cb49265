package connpool

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestTheBoundsOfTheDocsAreTheCodes: what has no field in Config is told in
// docs/operations.md, with the numbers of the code.
func TestTheBoundsOfTheDocsAreTheCodes(t *testing.T) {
	text, err := os.ReadFile("docs/operations.md")
	require.NoError(t, err)
	page := strings.Join(strings.Fields(string(text)), " ")
	said := func(d time.Duration) string {
		if d == time.Minute {
			return "a minute"
		}
		return strings.NewReplacer("ms", " ms", "s", " s").Replace(d.String())
	}
	require.Equal(t, "250 ms, 5 s", said(250*time.Millisecond)+", "+said(5*time.Second))
	require.Equal(t, 3, backoffAfter)
	for _, sentence := range []string{
		"after 3 failures in a row, with pauses of " + said(backoffMin) + " to " + said(backoffMax),
		"the pauses grow to " + said(hollowMax),
		"lost within " + said(youth) + ", before its first loan",
		"the last one " + said(failureMemory) + " old",
		"has not ended after " + said(closeTimeout) + ", or a dial or hook " + said(hookGrace) + " after its bound",
		"of a dialer's connection) is abandoned after " + said(foreignPatience),
		"A TLS close_notify gets " + said(tlsGoodbye),
		"cancelled after " + said(surplusPatience) + ", all but one",
		"waits at most " + said(closeGrace) + " for sockets and dials",
		"When nothing does for " + said(handlePatience) + " it asks",
	} {
		if !strings.Contains(page, sentence) {
			t.Errorf("docs/operations.md does not say %q", sentence)
		}
	}
}

package connpooltest_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/connpooltest"
)

func TestTheTextOfAScript(t *testing.T) {
	s, err := connpooltest.ParseScript(" late  cut@3&\nsplit@-1 reset@end drip ok& wrong")
	require.NoError(t, err)
	require.Equal(t, connpooltest.Script{
		{Fault: connpooltest.Late},
		{Fault: connpooltest.Cut, At: 3, Overlap: true},
		{Fault: connpooltest.Split, At: -1},
		{Fault: connpooltest.Reset, At: connpooltest.End},
		{Fault: connpooltest.Drip, At: 1},
		{Overlap: true},
		{Fault: connpooltest.Wrong},
	}, s)
	require.Equal(t, "late@0 cut@3& split@-1 reset@end drip@1 ok& wrong", s.String())
	require.Equal(t, s, connpooltest.FromBytes(s.Bytes()))
	empty, err := connpooltest.ParseScript("")
	require.NoError(t, err)
	require.Empty(t, empty)

	for text, says := range map[string]string{
		"ok boom":   `no fault is called "boom"`,
		"wrong@3":   "wrong takes no number",
		"cut@x":     `"x" is no number`,
		"cut@":      `"" is no number`,
		"drip@end":  `"end" is no number`,
		"late@0 &x": `no fault is called "&x"`,
	} {
		_, err := connpooltest.ParseScript(text)
		require.ErrorContains(t, err, says)
		require.Panics(t, func() { connpooltest.MustParseScript(text) })
	}
	require.Equal(t, "Fault(200)", connpooltest.Fault(200).String())
	require.Equal(t, "FailureKind(0)", connpooltest.FailureKind(0).String())
}

func TestAllBytesAreAScript(t *testing.T) {
	for first := range 256 {
		for _, second := range []int{0, 1, 15, 16, 126, 127, 128, 255} {
			s := connpooltest.FromBytes([]byte{byte(first), byte(second)})
			require.Len(t, s, 1)
			require.Equal(t, s, connpooltest.FromBytes(s.Bytes()))
		}
	}
	require.Len(t, connpooltest.FromBytes([]byte{3}), 1)
	require.Len(t, connpooltest.FromBytes(make([]byte, 1000)), 24)
	far := connpooltest.Script{{Fault: connpooltest.Cut, At: 1000}, {Fault: connpooltest.Cut, At: -1000}, {Fault: connpooltest.Drip, At: 1000}}
	require.Equal(t, "cut@126 cut@-128 drip@16", connpooltest.FromBytes(far.Bytes()).String())
}

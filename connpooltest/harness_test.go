package connpooltest_test

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/connpooltest"
)

// ADO-13
func TestTheHarnessFindsTheMistakeOfEachBrokenClient(t *testing.T) {
	for what, client := range broken {
		t.Run(what, func(t *testing.T) {
			err := client().Search(t)
			var f *connpooltest.Failure
			require.True(t, errors.As(err, &f), "not found: %v", err)
			require.Equal(t, connpooltest.Misdelivered, f.Kind, "%v", f)
			require.LessOrEqual(t, len(f.Script), 3, "%v", f)
			t.Log(f)
		})
	}
}

func TestAGoodClientPasses(t *testing.T) {
	require.NoError(t, good().Search(t))
}
